"""Loading, adapters, packed attention, the loss head, and export of Hugging Face models."""
