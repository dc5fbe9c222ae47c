"""The language model of every regime: a transformers model that runs packed rows and has a token loss.

Shapes: T packed tokens, N documents, S supervised rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lit_reason.errors import UserError
from lit_reason.kernels.head_loss import HeadOut
from lit_reason.models.adapters import (
    add_adapter,
    checkpoint_activations,
    compile_layers,
    decoder_layers,
    quantization,
)
from lit_reason.models.attention import packed_rows, packing_arguments, set_attention
from lit_reason.models.config import ModelConfig
from lit_reason.models.head import LossHead, check_head
from lit_reason.models.loading import load_model, own_random_stream, resolve_dtype
from lit_reason.models.lowrank import factored_folder, factored_settings, load_factors, make_lowrank


class ParameterCounts(NamedTuple):
    """Numbers of parameters; a tied output layer is counted once, a quantised weight by its real size.

    Args:
        total: all parameters.
        trainable: those that training changes.
        embedding: input embedding, and the output layer where it is a separate one.
    """

    total: int
    trainable: int
    embedding: int


class LanguageModel(nn.Module):
    """A causal language model for packed training and for generation on the same object.

    Args:
        hf: the transformers model, or a peft model around one. `hf.generate` works as ever.
        config: the settings it was made from.
    """

    def __init__(self, hf: nn.Module, config: ModelConfig):
        super().__init__()
        self.hf = hf
        self.config = config
        self.attention = set_attention(self.base, config.attention)
        self.head = LossHead(self.base)
        self._reference: tuple[LanguageModel] | None = None  # a tuple, so that it is no part of this module

    @classmethod
    def load(cls, config: ModelConfig) -> LanguageModel:
        """Read or create the model, add what the config asks for, and check that packing is safe.

        New weights (a model from `config`, a fresh adapter) depend only on the current seed. The result is in
        training mode and, unless quantised, on the CPU.

        Args:
            config: what the recipe says about the model.

        Returns:
            The model, ready to train.

        Raises:
            UserError: the recipe asks for something that does not exist or cannot work.
        """
        folder = factored_folder(config)
        if folder is not None:
            config = replace(config, lowrank=factored_settings(folder, config.lowrank))
        if config.lowrank is not None and config.adapter is not None:
            raise UserError("lm.adapter and lm.lowrank are both given: an adapter is for dense layers, choose one")
        hf: Any = load_model(config, quantization(config.adapter, resolve_dtype(config.dtype)))
        if config.lowrank is not None:
            with own_random_stream(1):  # not the numbers that embeddings were drawn from
                make_lowrank(hf, config.lowrank, from_weights=config.path is not None and folder is None)
        if folder is not None and torch.get_default_device().type != "meta":
            load_factors(hf, folder)
        if config.adapter is not None:
            with own_random_stream():
                hf = add_adapter(hf, config.adapter)
        model = cls(hf, config)
        if model.device.type != "meta":
            model.check()
        if config.gradient_checkpointing:
            checkpoint_activations(model.base)
        if config.compile:
            compile_layers(model.base)
        return model.train()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model itself, inside the peft wrapper if there is one."""
        return self.hf.get_base_model() if hasattr(self.hf, "peft_config") else self.hf  # type: ignore

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return decoder_layers(self.base)

    def train_layers(self, chosen: Iterable[int], last: int | None = None) -> None:
        """Freeze everything but what is trained of some decoder layers.

        Args:
            chosen: their numbers, from 0.
            last: the last layer that the loss depends on; None for all of them.

        Raises:
            UserError: there is no such layer, or nothing is left to train.
        """
        layers, numbers = self.layers, list(chosen)
        most = len(layers) - 1 if last is None else min(last, len(layers) - 1)
        kept = {id(p) for i in numbers if 0 <= i <= most for p in layers[i].parameters() if p.requires_grad}
        if not kept or not all(0 <= i <= most for i in numbers):
            raise UserError(f"model.layers is {numbers}: choose at least one of the layers 0 to {most} that is trained")
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in kept)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def max_length(self) -> int | None:
        """Number of positions the model was made for, or None where the architecture sets no limit."""
        text = self.base.config.get_text_config()
        return getattr(text, "max_position_embeddings", None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation, by the model's own settings."""
        ids = self.base.generation_config.eos_token_id
        if ids is None:
            ids = getattr(self.base.config.get_text_config(), "eos_token_id", None)
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def pad_id(self) -> int | None:
        """Padding token by the model's own settings; the first end token where there is none."""
        pad = self.base.generation_config.pad_token_id
        if pad is None:
            pad = getattr(self.base.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None else next(iter(self.eos_ids), None)

    def hidden(self, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Last hidden states of packed documents, none of which sees another.

        Args:
            ids_T: tokens of all documents end to end, [T].
            positions_T: position of each token in its document, [T], restarting at 0.
            cu_seqlens: cumulative document lengths, [N + 1], from 0 to T; may stay on the CPU.

        Returns:
            Hidden states, [T, D], that `head` takes.
        """
        extra = packing_arguments(self.attention, cu_seqlens, ids_T.device)
        backbone = getattr(self.base, "run_backbone", self.base.base_model)  # the former where weights are in shards
        with packed_rows():
            out = backbone(
                input_ids=ids_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                return_dict=True,
                **extra,
            )
        return out.last_hidden_state[0]

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        index_S: Tensor,
        targets_S: Tensor,
        weights_S: Tensor,
    ) -> HeadOut:
        """Token loss of a pack: `hidden`, the rows `index_S` of it, and `head` on them."""
        hidden_TD = self.hidden(ids_T, positions_T, cu_seqlens)
        return self.head(hidden_TD[index_S], targets_S, weights_S)

    @contextmanager
    def as_reference(self, copy: bool | None = None) -> Iterator[LanguageModel]:
        """The model as it was before training, in eval mode, for as long as the context lasts.

        Args:
            copy: take a frozen copy, read once from where the model came. False takes the model without its adapter;
                None does that where there is an adapter.

        Raises:
            UserError: the model began with random weights that only this run knew, or has no adapter to leave out.
        """
        adapted = hasattr(self.hf, "peft_config")
        if copy is False and not adapted:
            raise UserError("a reference without the adapter needs lm.adapter; without one, take a copy")
        if adapted and not copy:
            training = self.training
            with self.hf.disable_adapter():  # type: ignore[operator]
                try:
                    yield self.eval()
                finally:
                    self.train(training)
            return
        if self._reference is None:
            if self.config.path is None:
                raise UserError("a reference needs lm.path or lm.adapter: this model began with random weights")
            frozen = type(self).load(self.config).requires_grad_(False).eval()
            self._reference = (frozen.to(self.device),)
        yield self._reference[0]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Weights that lie in shards over processes (fsdp2) stay whole from their first use to the context's end.

        For generation, where every layer runs once a token. Each process then holds the whole model.
        """
        parts = [m for m in self.modules() if isinstance(m, FSDPModule) and m is not self.base]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()

    def drop_reference(self) -> None:
        """Free the frozen copy; `as_reference` reads it again."""
        self._reference = None

    def parameter_counts(self) -> ParameterCounts:
        """How many parameters there are, how many are trained, and how many belong to the embeddings."""
        counted = {id(p): (_size(p), p.requires_grad) for p in self.parameters()}
        inputs: Any = self.base.get_input_embeddings()
        ends = {id(p): _size(p) for p in (inputs.weight, self.head.weight)}
        total = sum(size for size, _ in counted.values())
        return ParameterCounts(total, sum(size for size, on in counted.values() if on), sum(ends.values()))

    @torch.no_grad()
    def check(self) -> None:
        """Make sure that packed documents are isolated and that the head computes the model's own logits.

        Two short documents are run packed and alone: three tiny forward passes.

        Raises:
            UserError: this architecture with this attention mixes documents, or its head is not understood.
        """
        training = self.training
        self.eval()
        try:
            check_head(self.base, self.head)
            vocabulary = self.head.weight.shape[0]
            ids = torch.arange(1, 8, device=self.device) * 7919 % vocabulary
            positions = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=self.device)
            packed = self.hidden(ids, positions, torch.tensor([0, 3, 7]))
            # 8-bit layers round activations by the columns of the whole row, so neighbours shift that rounding.
            eight_bit = any(p.dtype == torch.int8 for p in self.parameters())
            rounding = 1 / 127 if eight_bit else torch.finfo(packed.dtype).eps
            for start, stop in ((0, 3), (3, 7)):
                alone = self.hidden(ids[start:stop], positions[start:stop], torch.tensor([0, stop - start]))
                gap = float((packed[start:stop] - alone).abs().max())
                # Packing may change the order of sums, never more; a leak is as large as the states.
                if not gap <= rounding**0.5 * float(alone.abs().max()):
                    raise UserError(
                        f"attention '{self.attention}': {type(self.base).__name__} mixes documents that are "
                        "packed in one row, as recurrent and convolutional layers do; it cannot train packed"
                    )
        finally:
            self.train(training)


def _size(parameter: Tensor) -> int:
    """Number of weights; a 4-bit parameter stores two in a byte and keeps its true shape beside."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
