"""Many peers in one process, on a clock of their own."""
