"""From records on disk to packed token rows."""
