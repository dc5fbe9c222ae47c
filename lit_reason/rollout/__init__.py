"""Generation: prompts in, token ids out."""
