"""MMLU through EleutherAI's lm-evaluation-harness, for the utility part of the unlearning benchmark.

The challenge's own numbers come from Open-Instruct's evaluation code; both take the choice with the highest
probability over the 57 subjects, with other prompts, so they differ by some points.
"""

from __future__ import annotations

from typing import Any

from lit_reason.errors import UserError

SHOTS = 0


def harness() -> tuple[Any, Any]:
    """What evaluates tasks in lm-eval, and what wraps a model for it.

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("MMLU needs lm-eval: pip install 'lit-reason[mmlu]'") from error
    return simple_evaluate, HFLM


def mmlu_accuracy(model: Any, tokenizer: Any, *, limit: int | None = None, batch_size: int = 8) -> float:
    """Accuracy over all subjects of MMLU. Questions are downloaded, unless they are in the cache already.

    Args:
        model: a transformers model, or a peft model around one.
        tokenizer: its tokenizer.
        limit: questions a subject; None takes all.
        batch_size: questions at once.

    Returns:
        A share from 0 to 1.

    Raises:
        UserError: lm-eval is not installed.
    """
    simple_evaluate, language_model = harness()
    wrapped = language_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=["mmlu"], num_fewshot=SHOTS, limit=limit)
    return float(found["results"]["mmlu"]["acc,none"])
