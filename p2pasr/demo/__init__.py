"""The demonstration: a small Whisper, a synthetic corpus, and a real swarm on one machine."""
