"""Shorter traces written by a teacher model (strategy `regenerate`).

The paper's revised abstract sets EPiC against teacher-written condensation; the prompt its authors used was
not found in any source. The prompt below is this project's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_reason.data.condensation.markers import split_trace

Teacher = Callable[[str, str, int], str]
"""`teacher(question, trace, target_tokens)` gives a rewritten trace of about that many tokens."""

PROMPT = """\
Below are a question and a long chain of reasoning that answers it. Rewrite the reasoning so that it takes \
about {words} words. Keep each step that the answer depends on, in order, and the final answer exactly as it \
stands. Leave out detours, repeated checks and failed attempts. Write the shortened reasoning only.

Question:
{question}

Reasoning:
{trace}
"""
WORDS_PER_TOKEN = 0.75


def load_teacher(path: str) -> Teacher:
    """A teacher from a model folder, GGUF file or hub id, decoding greedily. Imports torch.

    Args:
        path: the model; its tokenizer's chat template is used where it has one.

    Returns:
        A `Teacher`. It may use up to twice the tokens asked for.
    """
    import torch

    from lit_reason.models.config import ModelConfig
    from lit_reason.models.loading import load_model, load_tokenizer

    config = ModelConfig(path=path)
    tokenizer: Any = load_tokenizer(config)
    model: Any = load_model(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def rewrite(question: str, trace: str, target_tokens: int) -> str:
        words = max(int(target_tokens * WORDS_PER_TOKEN), 1)
        text = PROMPT.format(words=words, question=question, trace=trace)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        coded = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        made = model.generate(**coded, max_new_tokens=2 * target_tokens, do_sample=False)
        answer = tokenizer.decode(made[0, coded["input_ids"].shape[1] :], skip_special_tokens=True)
        thought = split_trace(answer)  # a reasoning teacher thinks before it writes
        return (thought.rest if thought and thought.closing else answer).strip()

    return rewrite
