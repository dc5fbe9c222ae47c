"""Generated reasoning problems, each with an independent checker, and a student small enough for them."""
