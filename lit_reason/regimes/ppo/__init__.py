"""Policy gradients with a critic, rewarded turn by turn."""
