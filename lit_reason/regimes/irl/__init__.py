"""Reward learning from demonstrations (inverse reinforcement learning), in rounds."""
