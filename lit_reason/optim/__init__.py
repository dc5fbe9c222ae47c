"""Optimizers that torch does not have, their states plain tensors, so that checkpoints load without running code."""
