"""Checking what others did: traces, round records, and what follows from a mismatch."""
