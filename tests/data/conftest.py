"""Fixtures of the data tests."""

import pytest
from tiny_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer_of():
    """`tokenizer_of(template, ...)`: a tokenizer with that template, built once per set of arguments."""
    built = {}

    def get(template=None, **options):
        key = (template, *sorted(options.items()))
        if key not in built:
            built[key] = build_tokenizer(template, **options)
        return built[key]

    return get
