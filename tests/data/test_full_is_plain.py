"""Strategy `full` is plain fine-tuning: the rows it trains on are those of the text as it stands."""

import numpy as np

from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.rendering.render import Renderer
from lit_reason.tasks import chain
from lit_reason.tasks.student import build_tokenizer


def test_the_tokens_and_weights_of_full_are_those_of_the_text():
    config = chain.ChainConfig()
    tokenizer = build_tokenizer(chain.words(config))
    condenser = Condenser(CondenseConfig(strategy="full", min_tokens=0, min_chars=1), len)
    renderer = Renderer(tokenizer, RenderConfig())
    for number in range(20):
        record = chain.record(config, 0, number, held_out=False)
        (row,) = renderer.rows(condenser(to_conversation(record, f"r:{number}")))
        question, reply = (message["content"] for message in record["messages"])
        prompt = tokenizer(f"<|user|>{question}<|end|><|assistant|>", add_special_tokens=False).input_ids
        answer = tokenizer(f"{reply}<|end|>", add_special_tokens=False).input_ids
        assert row.ids.tolist() == [*prompt, *answer]
        assert np.array_equal(row.weight, [0.0] * len(prompt) + [1.0] * len(answer))
