"""Answer checkers and, later, other rewards: plain callables."""
