"""Ratios of turns and sequences, and importance weights, on numbers worked out by hand."""

import math

import pytest
import torch
from made_rollouts import rollout

from lit_reason.core.policy_config import PolicyConfig
from lit_reason.core.policy_loss import importance_weight, level_old_logp, policy_loss
from lit_reason.kernels.epilogues import Tokens, terms_of
from lit_reason.rollout.policy_pack import Credited, policy_packs


def pack(**fields):
    """Two rollouts, of two turns and of one, two tokens a turn; tokens of the pack in this order."""
    rollouts = [rollout([0.0, 0.0]), rollout([0.0])]
    credited = [Credited(t, torch.ones(len(t.ids))) for t in rollouts]
    (made,) = policy_packs(credited, 1, 1.0)
    for name, values in fields.items():
        setattr(made, name, torch.tensor(values))
    return made


def test_a_pack_knows_turns_and_rollouts_of_its_tokens():
    assert pack().rollout.tolist() == [0, 0, 0, 0, 1, 1]
    turn = pack().turn.tolist()
    assert [turn[0] == turn[1], turn[2] == turn[3], turn[4] == turn[5]] == [True] * 3 and len(set(turn)) == 3


OLD = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
NOW = [-0.8, -1.0, -1.4, -1.0, -1.0, -0.4]  # mean change by turn: 0.1, -0.2, 0.3; by rollout: -0.05, 0.3


@pytest.mark.parametrize(
    ("ratio", "changes"),
    [
        ("token", [0.2, 0, -0.4, 0, 0, 0.6]),
        ("turn", [0.1] * 2 + [-0.2] * 2 + [0.3] * 2),
        ("sequence", [-0.05] * 4 + [0.3] * 2),
    ],
)
def test_every_token_of_a_span_has_the_spans_ratio(ratio, changes):
    now, p = torch.tensor(NOW), pack(old_logp=OLD)
    tokens = Tokens(now, torch.zeros(6), slice(0, 6))
    terms = terms_of(policy_loss(PolicyConfig(ratio=ratio), p, now), tokens)
    torch.testing.assert_close(terms.metrics["ratio"], torch.tensor(changes).exp())
    clipped = [float(c > math.log(1.2)) for c in changes]  # advantage 1: the upper bound alone clips
    assert terms.metrics["clipped"].tolist() == clipped


def test_the_gradient_of_a_sequence_ratio_is_that_of_the_geometric_mean():
    """GSPO: averaged over the sequence's tokens, `s grad logp` is the gradient of s."""
    start = torch.tensor(NOW[:4], requires_grad=True)
    (wanted,) = torch.autograd.grad((start - torch.tensor(OLD[:4])).mean().exp(), start)
    now = torch.tensor(NOW[:4], requires_grad=True)
    old = level_old_logp(now.detach(), torch.tensor(OLD[:4]), torch.zeros(4, dtype=torch.long))
    (found,) = torch.autograd.grad((now - old).exp().mean(), now)
    torch.testing.assert_close(found, wanted)


SAMPLER = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
TRAINER = [-0.5, -1.5, -1.0, -0.7, -2.0, -1.0]


@pytest.mark.parametrize(
    ("level", "beyond", "wanted"),
    [
        ("token", "truncate", [1.5, math.exp(-0.5), 1.0, math.exp(0.3), math.exp(-1), 1.0]),
        ("token", "mask", [0.0, math.exp(-0.5), 1.0, math.exp(0.3), math.exp(-1), 1.0]),
        ("sequence", "truncate", [math.exp(0.3)] * 4 + [math.exp(-1)] * 2),
    ],
)
def test_importance_weights_are_capped_ratios_of_trainer_and_sampler(level, beyond, wanted):
    p = pack(old_logp=SAMPLER, start_logp=TRAINER)
    config = PolicyConfig(importance=level, importance_cap=1.5, beyond_cap=beyond)
    torch.testing.assert_close(importance_weight(config, p), torch.tensor(wanted))
    now = torch.tensor(TRAINER)
    terms = terms_of(policy_loss(config, p, now), Tokens(now, torch.zeros(6), slice(0, 6)))
    assert terms.metrics["ratio"].tolist() == [1.0] * 6  # the policy's own ratio starts from the trainer's pass
    torch.testing.assert_close(terms.loss_r, -torch.tensor(wanted))
