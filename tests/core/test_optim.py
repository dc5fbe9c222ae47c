"""Parameter groups and what an optimizer is given."""

import pytest
import torch
from torch import nn

from lit_reason.core.config import OptimConfig
from lit_reason.core.optim import build_optimizer
from lit_reason.errors import UserError


def test_vectors_are_not_decayed_and_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.5
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0.0


def test_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model, OptimConfig())


def test_eight_bit_states_are_bytes():
    pytest.importorskip("bitsandbytes", reason="extra quant is not installed")
    model = nn.Linear(128, 128)
    optimizer = build_optimizer(model, OptimConfig(optimizer="adamw8bit"))
    model(torch.randn(2, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8
