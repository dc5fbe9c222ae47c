"""A reward model: a sequence classifier of transformers on the policy's own token ids.

Shape letters: N responses, L tokens of prompt and response, Q tokens that all of them begin with, D width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.rewards.sequence_reward import SequenceReward

LEAST_SHARED = 4  # tokens in common that are worth a pass of their own


class ClassifierReward(SequenceReward):
    """The logit that a sequence classifier gives a response, read at the last token that is seen.

    Decoders with a head named `score` (GPT-2, Llama, Qwen2 and their kin) compute what all copies begin with once and
    keep it; other classifiers run as they are. The model stays in eval mode and is never trained here.

    Args:
        path: folder or hub id of a sequence classifier with the policy's tokenizer.
        label: which logit is the reward.
        device: where it runs.
        share_prompt: compute the common beginning of a batch once.

    Attributes:
        tokens: token positions that went through the model so far.
    """

    def __init__(self, path: str, label: int = 0, device: str = "cpu", share_prompt: bool = True) -> None:
        self.path, self.label, self.device, self.share_prompt = path, label, device, share_prompt
        self.version = f"classifier {path} {label}"
        self.tokens = 0
        self._shared: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] | None = None

    def load(self) -> None:
        """Read the model.

        Raises:
            UserError: there is no such model, or no such label.
        """
        _ = self.model

    @cached_property
    def model(self) -> Any:
        """The classifier, in eval mode, none of its weights trained."""
        from transformers import AutoModelForSequenceClassification

        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"ClassifierReward.path: '{self.path}' is no sequence classifier: {error}") from error
        if not 0 <= self.label < model.config.num_labels:
            last = model.config.num_labels - 1
            raise UserError(f"ClassifierReward.label is {self.label}; '{self.path}' has labels 0 to {last}")
        return model.eval().requires_grad_(False).to(self.device)

    @property
    def causal(self) -> bool:
        """Whether a token's state knows nothing of what follows, and the head is known."""
        return hasattr(self.model, "score") and not getattr(self.model.config, "is_encoder_decoder", False)

    @torch.no_grad()
    def __call__(self, ids_NL: Tensor, seen_NL: Tensor) -> Tensor:
        """Score responses."""
        ids_NL, seen_NL = ids_NL.to(self.model.device), seen_NL.to(self.model.device)
        kept = int(seen_NL.any(0).nonzero().max()) + 1 if bool(seen_NL.any()) else 1
        ids_NL, seen_NL = ids_NL[:, :kept], seen_NL[:, :kept]  # padding on the right of all of them
        if not self.causal:
            self.tokens += ids_NL.numel()
            return self.model(input_ids=ids_NL, attention_mask=seen_NL.long()).logits[:, self.label].float()
        hidden_NLD, Q = self._hidden(ids_NL, seen_NL)
        chosen_ND = hidden_NLD[torch.arange(len(ids_NL)), _last(seen_NL) - Q]
        return self.model.score(chosen_ND)[:, self.label].float()

    @torch.no_grad()
    def prefixes(self, ids_L: Tensor, start: int) -> Tensor | None:
        """One pass: a decoder's state at a token knows nothing of what follows."""
        if not self.causal or start < 1:
            return None
        hidden_1LD, _ = self._hidden(ids_L[None].to(self.model.device), torch.ones_like(ids_L, dtype=torch.bool)[None])
        return self.model.score(hidden_1LD[0, start - 1 :])[:, self.label].float()

    @torch.no_grad()
    def attention(self, ids_L: Tensor, start: int) -> Tensor:
        """Last layer, mean over heads, row of the last token (ABC, Chan et al., ICML 2024)."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the only one that returns weights
        try:
            self.tokens += len(ids_L)
            out = self.model(input_ids=ids_L[None].to(self.model.device), output_attentions=True)
        finally:
            self.model.set_attn_implementation(before)
        return out.attentions[-1][0].float().mean(0)[-1, start:].cpu()

    def _hidden(self, ids_NL: Tensor, seen_NL: Tensor) -> tuple[Tensor, int]:
        """Last hidden states from the first token on that is not shared, and its place."""
        from transformers.cache_utils import DynamicCache

        N, L = ids_NL.shape
        Q = self._common(ids_NL, seen_NL) if self.share_prompt and N > 1 else 0
        places = torch.arange(L, device=ids_NL.device)[None].expand(N, L)
        extra: dict[str, Any] = {"use_cache": False}
        if Q:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self._prompt(ids_NL[0, :Q])):
                cache.update(keys.expand(N, -1, -1, -1), values.expand(N, -1, -1, -1), layer)
            extra = {"past_key_values": cache, "use_cache": True}
        self.tokens += N * (L - Q)
        out = self.model.base_model(
            input_ids=ids_NL[:, Q:],
            attention_mask=seen_NL.long(),
            position_ids=places[:, Q:],
            return_dict=True,
            **extra,
        )
        return out.last_hidden_state, Q

    def _common(self, ids_NL: Tensor, seen_NL: Tensor) -> int:
        """Tokens that all rows begin with and see; the token that each is scored at is left to run."""
        same_L = ((ids_NL == ids_NL[:1]) & seen_NL).all(0)
        unequal = (~same_L).nonzero()
        Q = min(int(unequal[0]) if len(unequal) else len(same_L), int(_last(seen_NL).min()))
        return Q if Q > LEAST_SHARED else 0

    def _prompt(self, ids_Q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a beginning, kept until another one comes; a shorter one is read from a longer."""
        ids = tuple(ids_Q.tolist())
        if self._shared is None or self._shared[0][: len(ids)] != ids:
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache()
            self.tokens += len(ids)
            self.model.base_model(input_ids=ids_Q[None], past_key_values=cache, use_cache=True, return_dict=True)
            layers: Any = cache.layers
            self._shared = (ids, [(layer.keys, layer.values) for layer in layers])
        Q = len(ids)
        return [(keys[:, :, :Q], values[:, :, :Q]) for keys, values in self._shared[1]]


def _last(seen_NL: Tensor) -> Tensor:
    """Place of each row's last token that is seen; the first where none is."""
    place_L = torch.arange(seen_NL.shape[1], device=seen_NL.device)
    return torch.where(seen_NL, place_L, 0).amax(1)
