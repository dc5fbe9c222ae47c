"""Weights in shards are gathered once for a round of rollouts, not once a token, and are shards again behind it."""

from __future__ import annotations

import os

import pytest
import torch
import two_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.engine import Engine
from lit_reason.strategies.sharding import shard

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

PARTS = 3  # two layers and the output layer
NEVER = 39  # the end token; its logit is far below all others


class Tokenizer:
    """Decodes; no turn of this test ends by its text."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


class Gathers(TorchDispatchMode):
    """Counts gathers of weights."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "allgather" in op.name()
        return op(*args, **(kwargs or {}))


def sharded():
    torch.manual_seed(3)
    lm = LanguageModel.load(ModelConfig(config=two_ranks.TINY))
    shard(lm, init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    return lm


def one_round(lm, gather, tokens):
    """Ids of a turn of so many tokens, and how often weights were gathered for it."""
    engine = Engine(lm, Tokenizer(), SamplingConfig(temperature=0.0), [NEVER], gather)
    with Gathers() as gathers, engine.round(0) as held:
        engine.open([[1, 2, 3]])
        turn = engine.step([tokens])[0]
    assert held == 0
    return turn.ids, gathers.count


def gradients(lm, shards):
    for p in shards.values():  # as an optimizer does: what `lm` shows after a round may be the gathered weight
        p.grad = None
    ids = torch.arange(7)
    out = lm.head(lm.hidden(ids, ids, torch.tensor([0, 7]))[:-1], ids[1:])
    out.loss_sum.backward()
    return {n: p.grad.full_tensor() for n, p in shards.items()}


def whole(lm):
    """Names of the weights that are not in shards."""
    return [n for n, p in lm.named_parameters() if not isinstance(p, DTensor)]


def in_both():
    dist.init_process_group("gloo")
    lm = sharded()
    shards = dict(lm.named_parameters())
    before = gradients(lm, shards)
    layerwise = [one_round(lm, False, n) for n in (2, 6)]
    left = whole(lm)
    held = [one_round(lm, True, n) for n in (2, 6)]
    left = left, whole(lm)
    after = gradients(lm, shards)
    return {
        "layerwise": layerwise,
        "held": held,
        "left": left,
        "moved": [n for n in before if not torch.equal(before[n], after[n])],
    }


def test_a_round_gathers_once(tmp_path):
    for found in two_ranks.run(in_both, tmp_path):
        (short, few), (long, many) = found["layerwise"]
        (held_short, once), (held_long, still_once) = found["held"]
        assert (short, long) == (held_short, held_long) and len(long) == 6
        assert (few, many) == (1 + 2 * PARTS, 6 * PARTS)  # with every token; the embedding once, in the first round
        assert (once, still_once) == (PARTS, PARTS)
        assert found["left"][0] == found["left"][1] and not any("layers" in n for n in found["left"][0])
        assert not found["moved"]
