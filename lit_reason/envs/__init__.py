"""Environments that answer a model's turns: tools, questions, rewards."""
