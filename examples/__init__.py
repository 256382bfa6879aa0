"""Tasks of one's own, to read and to start from."""
