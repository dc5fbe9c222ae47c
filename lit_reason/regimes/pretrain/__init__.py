"""Pretraining on plain text, full-rank or low-rank."""
