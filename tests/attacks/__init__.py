"""Peers that cheat, and what becomes of them."""
