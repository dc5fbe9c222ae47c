"""Plain text for pretraining: documents, tokenizers trained on them, token rows and their data module."""
