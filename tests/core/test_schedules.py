"""Schedules against closed forms."""

import math

import pytest
from torch import nn

from lit_reason.core.config import OptimConfig
from lit_reason.core.optim import Rate, build_optimizer
from lit_reason.core.schedules import build_schedule, lr_factor, restarts_at
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


# ---- restarts ----

TOTAL, K, R = 1000, 200, 10
QUICK = OptimConfig(schedule="cosine_quick_recovery", warmup=0.1, final_lr=0.1, period_steps=K, recovery_steps=R)
JAGGED = OptimConfig(schedule="jagged_cosine", warmup=0.1, final_lr=0.1, period_steps=K, recovery_steps=R)


def cosine(step):
    """Warm-up over 100 steps and cosine to 10 %, written again."""
    if step < 100:
        return (step + 1) / 101
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 100) / 899)) / 2


@pytest.mark.parametrize("q", [K, 2 * K, 3 * K, 4 * K])
def test_quick_recovery_at_the_edges_of_a_restart(q):
    assert lr_factor(0, TOTAL, QUICK) == pytest.approx(1 / 101), "no restart at the start: the warm-up is not cut"
    assert lr_factor(q - 1, TOTAL, QUICK) == pytest.approx(cosine(q - 1))
    assert lr_factor(q, TOTAL, QUICK) == pytest.approx(0.001 * cosine(q + R))
    assert lr_factor(q + 3, TOTAL, QUICK) == pytest.approx(cosine(q + R) * (0.001 + 0.999 * 3 / 9))
    assert lr_factor(q + R - 1, TOTAL, QUICK) == pytest.approx(cosine(q + R))
    assert lr_factor(q + R, TOTAL, QUICK) == pytest.approx(cosine(q + R))
    assert lr_factor(q + R + 1, TOTAL, QUICK) == pytest.approx(cosine(q + R + 1))


@pytest.mark.parametrize("q", [K, 4 * K])
def test_jagged_cosine_at_the_edges_of_a_restart(q):
    assert lr_factor(q - 1, TOTAL, JAGGED) == pytest.approx(cosine(q - 1))
    assert lr_factor(q, TOTAL, JAGGED) == 0
    assert lr_factor(q + 3, TOTAL, JAGGED) == pytest.approx(0.3 * cosine(q))
    assert lr_factor(q + R - 1, TOTAL, JAGGED) == pytest.approx(0.9 * cosine(q))
    assert lr_factor(q + R, TOTAL, JAGGED) == pytest.approx(cosine(q + R))


def test_rewarming_rises_as_a_cosine_on_top_of_the_run():
    spam = OptimConfig(schedule="cosine_rewarm", warmup=0.1, final_lr=0.1, period_steps=K, recovery_steps=150)
    for q in (K, 3 * K):
        assert lr_factor(q - 1, TOTAL, spam) == pytest.approx(cosine(q - 1))
        assert lr_factor(q, TOTAL, spam) == pytest.approx(0.01 * cosine(q))
        assert lr_factor(q + 50, TOTAL, spam) == pytest.approx((0.01 + 0.99 * 0.25) * cosine(q + 50))
        assert lr_factor(q + 75, TOTAL, spam) == pytest.approx(0.505 * cosine(q + 75))
        assert lr_factor(q + 150, TOTAL, spam) == pytest.approx(cosine(q + 150))
    assert not restarts_at(4 * K, TOTAL, spam) and lr_factor(4 * K, TOTAL, spam) == pytest.approx(cosine(4 * K))


def test_restarts_are_due_on_multiples_after_the_warm_up_and_not_near_the_end():
    due = [step for step in range(TOTAL + 1) if restarts_at(step, TOTAL, QUICK)]
    assert due == [200, 400, 600, 800]
    late = OptimConfig(schedule="cosine", warmup=0.3, period_steps=200, recovery_steps=10)
    assert [s for s in range(891) if restarts_at(s, 890, late)] == [400, 600]  # 200 in the warm-up; 90 < 200 / 2 left
    slow = OptimConfig(schedule="cosine", warmup=0.0, period_steps=200, recovery_steps=120)
    assert [s for s in range(TOTAL) if restarts_at(s, TOTAL, slow)] == [200, 400, 600]  # 200 < 2 x 120 left at 800
    assert not any(restarts_at(s, TOTAL, OptimConfig()) for s in range(TOTAL))


def test_where_no_restart_is_due_the_rate_does_not_dip():
    for step in range(200, 260):
        late_warmup = OptimConfig(schedule="cosine_quick_recovery", warmup=0.25, period_steps=200, recovery_steps=10)
        assert lr_factor(step, TOTAL, late_warmup) == lr_factor(step, TOTAL, OptimConfig(warmup=0.25))
    for step in range(800, 850):  # 50 steps are left at 800
        assert lr_factor(step, 850, QUICK) == lr_factor(step, 850, OptimConfig(warmup=0.1))


def test_a_recovery_of_one_step_and_of_none():
    one = OptimConfig(schedule="cosine_quick_recovery", warmup=0.1, period_steps=K, recovery_steps=1)
    assert [lr_factor(s, TOTAL, one) for s in (200, 201)] == pytest.approx([0.001 * cosine(201), cosine(201)])
    none = OptimConfig(schedule="cosine_quick_recovery", warmup=0.1, period_steps=K, recovery_steps=0)
    assert lr_factor(200, TOTAL, none) == pytest.approx(cosine(200))


def test_wsd_stays_and_falls():
    config = OptimConfig(schedule="wsd", warmup=0.1, decay=0.25, final_lr=0.2)
    assert [lr_factor(s, 100, config) for s in (10, 50, 74)] == [1, 1, 1]
    assert lr_factor(74 + 9, 100, config) == pytest.approx(1 - 0.8 * math.sqrt(9 / 25))
    assert lr_factor(99, 100, config) == lr_factor(200, 100, config) == pytest.approx(0.2)


def test_a_schedule_with_restarts_needs_a_period_that_it_can_recover_in():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig())
    with pytest.raises(UserError, match="needs optim.period_steps"):
        build_schedule(optimizer, 10, OptimConfig(schedule="jagged_cosine"))
    with pytest.raises(UserError, match="optim.period_steps is 5, below optim.recovery_steps 10"):
        build_schedule(optimizer, 10, OptimConfig(schedule="cosine_quick_recovery", period_steps=5))


def test_a_resumed_schedule_goes_on_within_a_recovery():
    def rates(schedule, optimizer, steps):
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    config = OptimConfig(lr=1.0, schedule="cosine_quick_recovery", warmup=0.0, period_steps=20, recovery_steps=10)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, 100, config)
    whole = rates(schedule, optimizer, 23)
    states = schedule.state_dict(), optimizer.state_dict()
    whole += rates(schedule, optimizer, 20)
    again = build_optimizer(nn.Linear(2, 2), config)
    other = build_schedule(again, 100, config)
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert rates(other, again, 20) == whole[23:]
    assert whole[20] < 0.01 and whole[23] < whole[29]


def test_a_part_of_the_model_has_a_warm_up_of_its_own():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = OptimConfig(lr=1.0, schedule="linear", warmup=0.2, final_lr=0.0, weight_decay=0.5)
    optimizer = build_optimizer(module, config, dict.fromkeys(module[1].parameters(), Rate(2.0, 0.4)))
    schedule = build_schedule(optimizer, 10, config)
    seen = []
    for _ in range(10):
        seen.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})
        optimizer.step()
        schedule.step()
    for part, (lr, warmup) in zip(module, ((1.0, 0.2), (2.0, 0.4)), strict=True):
        shape = OptimConfig(schedule="linear", warmup=warmup, final_lr=0.0)
        wanted = [lr * lr_factor(step, 10, shape) for step in range(10)]
        for parameter in part.parameters():
            assert [rates[id(parameter)] for rates in seen] == pytest.approx(wanted)
