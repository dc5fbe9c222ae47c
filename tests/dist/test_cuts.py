"""What tensor parallelism refuses, told before any process talks to another."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig
from lit_reason.strategies.fsdp2 import FSDP2Strategy
from lit_reason.strategies.tensor_parallel import cut_matrices

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from tiny_models import tiny  # noqa: E402


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ({"family": "llama"}, 3, "3 does not divide num_attention_heads 4 of LlamaForCausalLM"),
        ({"family": "llama"}, 4, "4 does not divide num_key_value_heads 2"),
        ({"family": "llama", "changes": {"intermediate_size": 41}}, 2, "2 does not divide intermediate_size 41"),
        ({"family": "gpt2"}, 2, "transformers has none"),
        ({"family": "qwen3"}, 2, "transformers has one with replicated_with_grad_allreduce"),
        ({"family": "llama", "adapter": AdapterConfig(rank=2)}, 2, "lm.adapter"),
    ],
)
def test_layers_that_cannot_be_cut(model, size, said):
    with pytest.raises(UserError, match=f"tensor_parallel_size.*{said}"):
        cut_matrices(tiny(**model), SimpleNamespace(size=lambda: size))


@pytest.mark.parametrize("size", [0, 3])
def test_processes_that_cannot_be_dealt_into_groups(size):
    strategy = FSDP2Strategy(tensor_parallel_size=size)
    strategy.parallel_devices = [None] * 4
    with pytest.raises(UserError, match=f"tensor_parallel_size {size} does not divide 4 processes"):
        strategy.setup_environment()
