"""What a peer trains: pure functions from a state, shards and a seed to the next state. No network."""
