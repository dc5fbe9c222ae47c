"""Measurements: each script prints a table and leaves a dated JSON file under benchmarks/results."""
