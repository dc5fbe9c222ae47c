"""lit_reason: a modular trainer for reasoning language models on PyTorch Lightning."""

__version__ = "0.1.0"
