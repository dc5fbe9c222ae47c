"""From a recipe's `dialogue.backend` to what samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backend import Backend
from lit_reason.rollout.config import BackendConfig, SamplingConfig
from lit_reason.rollout.continuous import ContinuousBatching
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.server import CompletionServer


def backend_for(
    config: BackendConfig, lm: LanguageModel, tokenizer: Any, sampling: SamplingConfig, stop_ids: Sequence[int]
) -> Backend:
    """The back end that a recipe asks for.

    Args:
        config: which one, and its settings.
        lm: the trainer's model.
        tokenizer: decodes, and nothing else.
        sampling: temperature, truncation and seed.
        stop_ids: tokens that end a turn.

    Raises:
        UserError: it cannot sample from this model this way.
    """
    if config.name == "server":
        return CompletionServer(lm, tokenizer, sampling, stop_ids, config)
    if config.name == "continuous":
        return ContinuousBatching(lm, tokenizer, sampling, stop_ids)
    return Engine(lm, tokenizer, sampling, stop_ids, config.gather)
