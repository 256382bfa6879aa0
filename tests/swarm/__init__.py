"""Real peers on loopback: every process, key, daemon and DHT as in a home."""
