"""Schedule and parameter groups against closed forms."""

import pytest
import torch
from torch import nn

from lit_reason.core.config import OptimConfig
from lit_reason.core.optim import build_optimizer, build_schedule, lr_factor
from lit_reason.errors import UserError


def test_linear_schedule_by_hand():
    config = OptimConfig(schedule="linear", warmup=0.2, final_lr=0.0)
    assert [lr_factor(s, 10, config) for s in range(10)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_final_lr_and_stay_there(schedule):
    config = OptimConfig(schedule=schedule, warmup=0.1, final_lr=0.25)
    assert lr_factor(99, 100, config) == pytest.approx(0.25)
    assert lr_factor(500, 100, config) == pytest.approx(0.25)
    assert lr_factor(10, 100, config) == pytest.approx(1.0)


def test_cosine_is_half_way_in_the_middle():
    config = OptimConfig(schedule="cosine", warmup=0.0, final_lr=0.0)
    assert lr_factor(50, 101, config) == pytest.approx(0.5)


def test_constant_ignores_final_lr():
    config = OptimConfig(schedule="constant", warmup=0.0, final_lr=0.0)
    assert lr_factor(99, 100, config) == 1.0


def test_a_run_of_one_step_trains():
    assert lr_factor(0, 1, OptimConfig()) > 0


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


def test_schedule_steps_the_optimizer():
    config = OptimConfig(lr=0.4, schedule="linear", warmup=0.0, final_lr=0.5)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, 3, config)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2])


def test_eight_bit_states_are_bytes():
    pytest.importorskip("bitsandbytes", reason="extra quant is not installed")
    model = nn.Linear(128, 128)
    optimizer = build_optimizer(model, OptimConfig(optimizer="adamw8bit"))
    model(torch.randn(2, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8
