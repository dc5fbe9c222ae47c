"""Rows as the loss sees them, and what is wrong with them."""
