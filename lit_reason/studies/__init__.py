"""Studies: many runs that differ in one thing, compared fairly."""
