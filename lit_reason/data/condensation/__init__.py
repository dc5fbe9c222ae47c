"""Shorter reasoning traces: where a trace is, what a thought is, which ones stay, and what became of the rows."""
