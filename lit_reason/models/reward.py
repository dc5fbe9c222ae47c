"""A reward model: one number for a text, by a linear head on any causal language model.

It stands on a trunk of its own, or on one more adapter of the policy's frozen base: then policy, reward and reference
(the base without adapter) share all large weights.

A text's reward is read behind its last token, which the pack's boundaries tell, never a comparison of ids: padding,
left or right, and an end token that also pads change nothing. Shape letters: T packed tokens, N texts, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import hub_errors, locate, own_random_stream, resolve_dtype

REWARD_ADAPTER, POLICY_ADAPTER = "reward", "default"
STREAM = 2  # of random numbers, for weights that no file holds


class RewardModel(nn.Module):
    """A scalar on the last hidden state, `score(h_t)`, without bias: an offset means nothing between rewards.

    Args:
        lm: the trunk.
        shared: the trunk is the policy itself, of which an adapter named `reward` is this model's own.

    Attributes:
        mean: of its scores on demonstrations, once measured.
        std: their deviation; `normalised` divides by it.
    """

    def __init__(self, lm: LanguageModel, *, shared: bool) -> None:
        super().__init__()
        self.score = nn.Linear(lm.head.weight.shape[1], 1, bias=False, device=lm.device)
        self.trunk = None if shared else lm
        self._lm = (lm,)  # a tuple, so that a shared policy is no part of this module
        self.mean, self.std = 0.0, 1.0
        if self.trunk is not None and lm.head.layer.weight is not lm.base.get_input_embeddings().weight:  # type: ignore[union-attr]
            lm.head.layer.requires_grad_(False)

    @classmethod
    def beside(cls, policy: LanguageModel, config: ModelConfig, path: str | None = None) -> RewardModel:
        """A reward model for a policy.

        Args:
            policy: the policy. With an adapter, and without a path, its base is shared.
            config: where the policy came from; a trunk of its own comes from there too, all of its weights trained.
            path: folder or hub id of a reward model (sequence classification, one label) or of a language model.

        Raises:
            UserError: there is nothing to read at `path`.
        """
        if config.adapter is not None and path is None:
            add_reward_adapter(policy)
            with own_random_stream(STREAM):
                reward = cls(policy, shared=True)
            reward.restart(0)
            return reward
        own = dataclasses.replace(config, adapter=None)
        if path is not None:
            own = dataclasses.replace(own, path=path, config=None)
        reward = cls.load(own)
        return reward.to(policy.device)

    @classmethod
    def load(cls, config: ModelConfig) -> RewardModel:
        """A reward model on a trunk of its own.

        Args:
            config: a sequence-classification folder with one label, whose head is read, or any causal language model,
                which gets a new head.

        Raises:
            UserError: there is no such model, or it has more than one label.
        """
        found = _classifier(config)
        if found is None:
            reward = cls(LanguageModel.load(config), shared=False)
            reward.restart(0, trunk=False)
            return reward
        trunk = AutoModelForCausalLM.from_config(found.config, dtype=resolve_dtype(config.dtype))
        trunk.base_model.load_state_dict(found.base_model.state_dict())
        reward = cls(LanguageModel(trunk, config).train(), shared=False)
        with torch.no_grad():
            reward.score.weight.copy_(found.score.weight)
        reward.mean = float(getattr(found.config, "reward_mean", 0.0))
        reward.std = float(getattr(found.config, "reward_std", 1.0))
        return reward

    @property
    def lm(self) -> LanguageModel:
        """The trunk, shared or not."""
        return self._lm[0]

    def shard(self, mesh: Any) -> None:
        """Spread the head over processes; a trunk of its own is spread like any model.

        Args:
            mesh: data-parallel mesh.
        """
        fully_shard(self.score, mesh=mesh)

    @torch.no_grad()
    def restart(self, seed: int, *, trunk: bool = True) -> None:
        """Begin anew: a head from N(0, 1 / (D + 1)), and the trunk, or the adapter, as it was before training.

        Args:
            seed: of the head, and of a shared base's adapter.
            trunk: reset the trunk too.
        """
        let_go(self)
        let_go(self.lm)
        draws = torch.Generator().manual_seed(seed)
        width = self.score.weight.shape[1]
        _put(self.score.weight, torch.randn((1, width), generator=draws) / (width + 1) ** 0.5)
        self.mean, self.std = 0.0, 1.0
        if trunk and self.trunk is not None:
            fresh = RewardModel.load(self.trunk.config).lm
            for parameter, first in zip(self.trunk.parameters(), fresh.parameters(), strict=True):
                _put(parameter, first)
        elif trunk:
            for name, parameter in self.lm.named_parameters():
                if f".{REWARD_ADAPTER}." in name:
                    bound = 0.0 if "lora_B" in name else parameter.shape[-1] ** -0.5  # as peft draws them
                    _put(parameter, bound * (2 * torch.rand(parameter.shape, generator=draws) - 1))

    def token_scores(self, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Score behind every token, `float32 [T]`: the reward of the text so far.

        Args:
            ids_T: tokens of packed texts, prompts included, as for `LanguageModel.hidden`.
            positions_T: their positions.
            cu_seqlens: boundaries of the texts.
        """
        with self.active():
            hidden = self.lm.hidden(ids_T, positions_T, cu_seqlens)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float())[:, 0]

    def forward(self, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Score of each text, `float32 [N]`, not normalised.

        Args:
            ids_T: tokens, as for `token_scores`.
            positions_T: their positions.
            cu_seqlens: boundaries of the N texts.
        """
        return self.token_scores(ids_T, positions_T, cu_seqlens)[cu_seqlens[1:].long().to(ids_T.device) - 1]

    def token_rewards(self, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What each token added, `float32 [T]`: the score behind it less the score before it.

        The rewards of a text sum to its score; a text's first token carries the score behind itself.

        Args:
            ids_T: tokens, as for `token_scores`.
            positions_T: their positions.
            cu_seqlens: boundaries of the texts.
        """
        scores_T = self.token_scores(ids_T, positions_T, cu_seqlens)
        before_T = torch.cat([scores_T.new_zeros(1), scores_T[:-1]])
        return scores_T - before_T.masked_fill(positions_T == 0, 0.0)

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores in deviations from the mean of demonstrations.

        Args:
            scores: as `forward` gave them.
        """
        return (scores - self.mean) / self.std

    @contextmanager
    def active(self) -> Iterator[None]:
        """The trunk computes this model, not the policy, for as long as the context lasts."""
        if self.trunk is not None:
            yield
            return
        use_adapter(self.lm, REWARD_ADAPTER)
        try:
            yield
        finally:
            use_adapter(self.lm, POLICY_ADAPTER)


def _put(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, which may be in shards."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def let_go(module: nn.Module) -> None:
    """Where weights are in shards, drop gathered copies: they stand in place of the shards, which are what is trained.

    Args:
        module: sharded or not.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def add_reward_adapter(lm: LanguageModel) -> None:
    """Put the reward's adapter beside the policy's, of its shape; nothing happens where it is there already.

    Args:
        lm: the policy, whole: in shards it is too late.
    """
    hf: Any = lm.hf
    if REWARD_ADAPTER not in hf.peft_config:
        with own_random_stream(STREAM):
            hf.add_adapter(REWARD_ADAPTER, hf.peft_config[POLICY_ADAPTER])
        train_all_adapters(lm)


def use_adapter(lm: LanguageModel, name: str) -> None:
    """Make one adapter of a model the active one; all of them stay trainable.

    Args:
        lm: a model with adapters.
        name: which.
    """
    hf: Any = lm.hf
    hf.set_adapter(name)
    train_all_adapters(lm)


def train_all_adapters(lm: LanguageModel) -> None:
    """Undo what peft does whenever it changes or disables adapters: it freezes all but the active one.

    Args:
        lm: a model with adapters; without, nothing happens.
    """
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


def _classifier(config: ModelConfig) -> Any:
    """The sequence-classification model at `config.path`; None where there is another kind of model."""
    if config.path is None:
        return None
    source, gguf = locate(config.path, "reward model path")
    if gguf:
        return None
    with hub_errors(config.path, "reward model path"):
        fields = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    if not any("ForSequenceClassification" in name for name in fields.architectures or ()):
        return None
    if fields.num_labels != 1:
        raise UserError(f"reward model path: {config.path} has {fields.num_labels} labels; a reward model has one")
    with hub_errors(config.path, "reward model path"):
        return AutoModelForSequenceClassification.from_pretrained(
            source, dtype=resolve_dtype(config.dtype), trust_remote_code=config.trust_remote_code
        )
