"""A model in parts is steered, and read, as a whole one: packed, and generating with a cache from padded prompts."""

from __future__ import annotations

import os

import pytest
import torch
import two_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.steering.collect import collected
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions, model_facts
from lit_reason.steering.hook import SteeringHook
from lit_reason.strategies.sharding import shard

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

TINY = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def steered(mesh: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """States, tokens and the model's facts, with directions on."""
    torch.manual_seed(0)
    lm = LanguageModel.load(ModelConfig(config=TINY, dtype="float32")).eval()
    facts = model_facts(lm.base)
    if mesh is not None:
        dist.init_process_group("gloo")
        shard(lm, init_device_mesh("cpu", mesh, mesh_dim_names=("data_parallel", "tensor_parallel")))
        assert model_facts(lm.base) == facts
    there = Directions({"a": torch.linspace(-1, 1, 16)}, 0, 2.0, None, {"model": facts})
    ids, mask = torch.tensor([[0, 5, 9], [3, 1, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad(), SteeringHook(lm.base, there, SteerConfig({"a": 1.0}, 1.5)) as hook:
        with collected(lm.base, [0]) as states:
            packed = lm.hidden(torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.tensor([0, 3, 7]))
        made = lm.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert hook.passes == 5
    return {"packed": packed, "layer": states[0], "made": made}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["sharded", "tensor_parallel"])
def test_parts_are_steered_as_the_whole(tmp_path, mesh):
    whole = steered(None)
    for part in two_ranks.run(steered, tmp_path, mesh):
        assert torch.equal(part["made"], whole["made"])
        torch.testing.assert_close(part["packed"], whole["packed"])
        torch.testing.assert_close(part["layer"], whole["layer"])
