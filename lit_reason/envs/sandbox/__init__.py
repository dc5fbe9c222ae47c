"""Python that a model wrote, run where it can do nothing but compute and print."""
