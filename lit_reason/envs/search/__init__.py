"""Questions that a model answers by searching a corpus."""
