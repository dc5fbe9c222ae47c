"""Which tokens of a response earned its reward."""
