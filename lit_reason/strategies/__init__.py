"""How a model is spread over several processes."""
