"""Recordings in, shards out, error rates at the end. Nothing here knows the network."""
