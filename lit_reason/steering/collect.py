"""Activations of chosen decoder layers, and the features that segments of texts make of them.

Shape letters: T packed tokens, R texts in the pack, N features, L layers, D width, F feature width (D or s D).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_reason.errors import UserError, did_you_mean
from lit_reason.models.adapters import decoder_layers


def chosen_layers(model: Any, wanted: Sequence[int]) -> list[nn.Module]:
    """Decoder layers by number.

    Args:
        model: a transformers model, without a peft wrapper.
        wanted: numbers from 0.

    Raises:
        UserError: the model has no such layer.
    """
    layers = decoder_layers(model)
    for number in wanted:
        if not 0 <= number < len(layers):
            raise UserError(f"layer {number}: this model has {len(layers)} decoder layers, 0 to {len(layers) - 1}")
    return [layers[number] for number in wanted]


def output_states(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: a tensor, or a tuple that begins with one."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def collected(model: Any, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, every forward pass leaves the outputs of the chosen layers in the yielded dict.

    Args:
        model: a transformers model, without a peft wrapper.
        wanted: layer numbers.

    Yields:
        By layer, the last pass's states as the layer returned them. Nothing stays attached to the model afterwards.
    """
    states: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[number] = output_states(output).detach()

        return hook

    layers = chosen_layers(model, wanted)
    handles = [layer.register_forward_hook(keep(n)) for n, layer in zip(wanted, layers, strict=True)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class Segments(NamedTuple):
    """Features of the texts of one pack.

    Attributes:
        features_NLF: float32, on the CPU.
        norms_NL: mean length of the token states in each feature.
        text_N: which text of the pack each belongs to.
        place_N: position at which it begins.
        short: texts of the pack that are too short to give any.
    """

    features_NLF: Tensor
    norms_NL: Tensor
    text_N: Tensor
    place_N: Tensor
    short: list[int]


def segment_features(states_TLD: Tensor, lengths: Sequence[int], mode: str, first: int, length: int | None) -> Segments:
    """Cut the segment `first .. first + length - 1` out of every text of a pack.

    A `token` or `mean` segment may end early with its text; `concat` needs the whole of it.

    Args:
        states_TLD: layer outputs of the texts, end to end.
        lengths: tokens of each text; they sum to T.
        mode: `token`, `mean` or `concat`.
        first: position at which the segment begins.
        length: tokens of the segment; None means to the end (not with `concat`).

    Returns:
        The features; `F` is D, and `length * D` for `concat`.
    """
    states_TLD = states_TLD.float().cpu()
    features: list[Tensor] = []
    norms: list[Tensor] = []
    texts: list[int] = []
    places: list[int] = []
    short: list[int] = []
    for number, rows_TLD in enumerate(states_TLD.split(list(lengths))):
        cut_TLD = rows_TLD[first : None if length is None else first + length]
        needed = length if mode == "concat" and length else 1
        if len(cut_TLD) < needed:
            short.append(number)
            continue
        norm_TL = cut_TLD.norm(dim=-1)
        if mode == "token":
            features.append(cut_TLD)
            norms.append(norm_TL)
            places += range(first, first + len(cut_TLD))
            texts += [number] * len(cut_TLD)
            continue
        whole_LF = cut_TLD.mean(0) if mode == "mean" else cut_TLD.transpose(0, 1).flatten(1)
        features.append(whole_LF[None])
        norms.append(norm_TL.mean(0)[None])
        places.append(first)
        texts.append(number)
    layers, width = states_TLD.shape[1], states_TLD.shape[2] * (length or 1 if mode == "concat" else 1)
    empty = torch.zeros(0, layers, width), torch.zeros(0, layers)
    return Segments(
        torch.cat([empty[0], *features]),
        torch.cat([empty[1], *norms]),
        torch.tensor(texts).long(),
        torch.tensor(places).long(),
        short,
    )


def stacked(states: dict[int, Tensor], wanted: Sequence[int]) -> Tensor:
    """Layer outputs `[1, T, D]` of a packed pass as one tensor `[T, L, D]`."""
    return torch.stack([states[number][0] for number in wanted], dim=1)


@torch.no_grad()
def contrast_states(
    lm: Any, tokenizer: Any, contrast: Mapping[str, Sequence[str]], wanted: Sequence[int], known: Sequence[str]
) -> dict[str, Tensor]:
    """Differences of two prompts' states, position by position (ActAdd, arXiv 2308.10248).

    The shorter prompt of a pair is filled up with spaces, as there.

    Args:
        lm: the language model.
        tokenizer: its tokenizer.
        contrast: by name, the prompt to go towards and the one to come from.
        wanted: layer numbers.
        known: names that there may be.

    Returns:
        By name, `[L, s, D]`.

    Raises:
        UserError: a name is none of the classes, or has not two prompts.
    """
    found: dict[str, Tensor] = {}
    for name, pair in contrast.items():
        if name not in known:
            raise UserError(
                f"direction.contrast: '{name}' is no class{did_you_mean(name, known)}; they are {', '.join(known)}"
            )
        if len(pair) != 2:
            raise UserError(f"direction.contrast.{name} has {len(pair)} prompts; give two, towards and from")
        ids = [list(tokenizer(text).input_ids) for text in pair]
        space = tokenizer(" ", add_special_tokens=False).input_ids[-1:] or [tokenizer.eos_token_id]
        length = max(len(row) for row in ids)
        rows = torch.tensor([row + space * (length - len(row)) for row in ids], device=lm.device)
        at = torch.arange(length, device=lm.device).repeat(2)
        with collected(lm.base, wanted) as states:
            lm.hidden(rows.flatten(), at, torch.tensor([0, length, 2 * length]))
        towards_TLD, away_TLD = stacked(states, wanted).float().cpu().split(length)
        found[name] = (towards_TLD - away_TLD).transpose(0, 1).contiguous()
    return found
