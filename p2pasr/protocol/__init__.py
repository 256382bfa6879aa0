"""What peers say to each other and what follows from it: bytes, rules and states, no IO."""
