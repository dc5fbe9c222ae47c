"""Rewards: answer checkers, rewards of dialogues, and their composition; all plain callables."""
