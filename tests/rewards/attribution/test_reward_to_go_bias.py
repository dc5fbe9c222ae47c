"""What shaping does to the policy gradient, by enumeration of every response: bias, variance, and the optimum.

Vocabulary 3, length 4, 81 responses. The gradient of the expected return is exact, and so is the expectation of every
estimator. Credit of a token that depends on later tokens biases reward-to-go; the full return does not.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_reason.credit.rewards import to_go
from lit_reason.rewards.attribution.attributor import Attributor
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.planted import PlantedReward

V, T = 3, 4
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=T)))
EXPLAINERS = ("final", "uniform", "prefix", "shap", "lime")


@pytest.fixture(scope="module")
def credit_KNT():
    reward = PlantedReward(V, pairs=1.0, seed=5)
    attributor = Attributor(EXPLAINERS, AttributionConfig(shapley="exact"))
    return torch.stack([attributor.explain(reward, [], r.tolist()).credit_KT for r in RESPONSES], 1)


def policy():
    """Log-probability of each token of each response, from a table of logits for every prefix."""
    logits = torch.randn((1 + V + V**2 + V**3, V), generator=torch.Generator().manual_seed(1)).double()
    logits.requires_grad_()
    rows = []
    for response in RESPONSES.tolist():
        state, first, number = [], 0, 0
        for t in range(T):
            state.append(first + number)
            first, number = first + V**t, number * V + response[t]
        rows.append(state)
    return logits, logits.log_softmax(-1)[torch.tensor(rows)].gather(2, RESPONSES[:, :, None])[:, :, 0]


def expected(q_NT):
    """Expectation of `sum_t q_t grad log pi_t`, and its second moment."""
    logits, logp_NT = policy()
    chance_N = logp_NT.sum(1).exp().detach()
    samples = [
        torch.autograd.grad((q * logp).sum(), logits, retain_graph=True)[0]
        for q, logp in zip(q_NT, logp_NT, strict=True)
    ]
    each = torch.stack(samples)
    return torch.einsum("n,n...->...", chance_N, each), float((chance_N * each.square().flatten(1).sum(1)).sum())


@pytest.fixture(scope="module")
def table(credit_KNT):
    """Relative error of the expected gradient under reward-to-go and under the return, and second moments."""
    logits, logp_NT = policy()
    reward_N = credit_KNT[0].sum(1)
    (true,) = torch.autograd.grad((logp_NT.sum(1).exp() * reward_N).sum(), logits)
    found = {}
    for name, credit_NT in zip(EXPLAINERS, credit_KNT, strict=True):
        row = {}
        for how, q_NT in (("to_go", to_go(credit_NT)), ("return", credit_NT.sum(1, keepdim=True).expand(-1, T))):
            mean, moment = expected(q_NT)
            row[how] = (float((mean - true).norm() / true.norm()), moment)
        found[name] = row
    return found


def test_causal_credit_is_unbiased_and_the_rest_is_not(table):
    for name in ("final", "prefix"):
        assert table[name]["to_go"][0] < 1e-10
    for name in ("shap", "uniform", "lime"):
        assert table[name]["to_go"][0] > 0.01


def test_the_full_return_is_unbiased_whatever_the_credit(table):
    for name in EXPLAINERS:
        assert table[name]["return"][0] < 1e-10


def test_bias_buys_variance(table):
    moment = {name: table[name]["to_go"][1] for name in EXPLAINERS}
    assert moment["uniform"] < moment["shap"] < moment["final"]


def test_the_order_of_the_policies_is_the_same_under_every_shaping(credit_KNT):
    returns_KN = credit_KNT.sum(2)
    for row in returns_KN[1:]:
        torch.testing.assert_close(row, returns_KN[0], rtol=0, atol=1e-9)
    assert len({int(row.argmax()) for row in returns_KN}) == 1
