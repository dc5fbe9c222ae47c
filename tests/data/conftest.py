"""Fixtures of the data tests."""

import pytest
from tiny_tokenizer import END_OF, build_tokenizer

from lit_reason.data.config import RenderConfig
from lit_reason.data.rendering.render import Renderer


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


@pytest.fixture
def renderer_of(tokenizer_of):
    """`renderer_of(template, ...)`: a renderer with that template, under a `RenderConfig` of the other arguments."""

    def get(template, *, kwargs=None, generation_eos=None, tokenizer=None, **config):
        eos = "<|im_end|>" if END_OF.get(template) == "<|im_end|>" else "</s>"
        tokenizer = tokenizer or tokenizer_of(template, eos=eos)
        return Renderer(tokenizer, RenderConfig(**config), template_kwargs=kwargs, generation_eos=generation_eos)

    return get
