"""Credit by turn against plain sums, and the share of the gradient against autograd on logits."""

from __future__ import annotations

import statistics

import pytest
import torch

from lit_reason.metrics.turn_credit import TurnCredit


def rollout(seed, turn_id, vocabulary=7):
    """Logits, sampled tokens, their log-probabilities and advantages of a rollout."""
    generator = torch.Generator().manual_seed(seed)
    turn_id_T = torch.tensor(turn_id)
    logits_TV = torch.randn(len(turn_id), vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_T = torch.randint(0, vocabulary, (len(turn_id),), generator=generator)
    logprob_T = logits_TV.log_softmax(-1).gather(1, ids_T[:, None])[:, 0]
    advantage_T = torch.randn(len(turn_id), generator=generator, dtype=torch.float64) * (turn_id_T >= 0)
    return logits_TV, logprob_T, advantage_T, turn_id_T


ROLLOUTS = [rollout(0, [-1, 0, 0, -1, 1]), rollout(1, [-1, 0, -1, 1, 1, -1, 2]), rollout(2, [-1, 0, 0, 0])]
WEIGHTS = [0.5, 2.0, 1.0]


def metric(turns=3, weights=WEIGHTS):
    found = TurnCredit(turns)
    for (_, logprob_T, advantage_T, turn_id_T), weight in zip(ROLLOUTS, weights, strict=True):
        found.update(advantage_T, turn_id_T, logprob_T.detach(), weight)
    return found


def test_the_share_is_that_of_the_gradient_at_the_logits():
    loss = sum(-(w * a * p)[t >= 0].sum() for (_, p, a, t), w in zip(ROLLOUTS, WEIGHTS, strict=True))
    gradients = torch.autograd.grad(loss, [logits for logits, *_ in ROLLOUTS])
    pulls = [0.0] * 3
    for (_, _, _, turn_id_T), gradient_TV in zip(ROLLOUTS, gradients, strict=True):
        for k in range(3):
            pulls[k] += float(gradient_TV[turn_id_T == k].abs().sum())
    found = metric().compute()
    assert [float(found[f"gradient_turn_{k}"]) for k in (1, 2, 3)] == pytest.approx([p / sum(pulls) for p in pulls])


def test_the_variance_is_over_rollouts_that_reached_the_turn():
    found = metric().compute()
    firsts = [float(a[t == 0].mean()) for _, _, a, t in ROLLOUTS]
    seconds = [float(a[t == 1].mean()) for _, _, a, t in ROLLOUTS[:2]]
    assert float(found["variance_turn_1"]) == pytest.approx(statistics.variance(firsts))
    assert float(found["variance_turn_2"]) == pytest.approx(statistics.variance(seconds))
    assert "variance_turn_3" not in found  # one rollout has none


def test_rollouts_out_of_the_loss_do_not_count_and_late_turns_share_a_place():
    without = metric(weights=[0.5, 0.0, 1.0]).compute()
    assert set(without) == {"variance_turn_1", "gradient_turn_1", "gradient_turn_2"}
    two = metric(turns=2).compute()
    assert set(two) == {f"{name}_turn_{k}" for name in ("variance", "gradient") for k in (1, 2)}
    three = metric().compute()
    assert float(two["gradient_turn_2"]) == pytest.approx(float(three["gradient_turn_2"] + three["gradient_turn_3"]))


def test_nothing_seen_says_nothing():
    assert TurnCredit(3).compute() == {}
