"""What only a GPU can tell. Each script is one command under a time budget: `python -m benchmarks.gpu.run1`."""
