"""Supervised fine-tuning on (condensed) reasoning traces."""
