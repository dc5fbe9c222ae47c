"""Torchmetrics subclasses and the statistics printed beside every accuracy."""
