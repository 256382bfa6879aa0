"""One part at a time, without a network."""
