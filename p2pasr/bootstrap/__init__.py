"""An entry point for newcomers: a DHT node that stays up under one address."""
