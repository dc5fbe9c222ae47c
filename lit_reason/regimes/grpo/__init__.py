"""Policy gradients with group baselines, turn by turn."""
