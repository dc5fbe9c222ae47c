"""Credit sums to the reward: every mode, every explainer, with padding, for one token, for negative rewards."""

from __future__ import annotations

import pytest
import torch
from games import Interactions, generator
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.errors import UserError
from lit_reason.rewards.attribution import token_credit as module
from lit_reason.rewards.attribution.attributor import Attributor
from lit_reason.rewards.attribution.config import SHARES, SIGNED, AttributionConfig
from lit_reason.rewards.attribution.lime import lime
from lit_reason.rewards.attribution.token_credit import mixed, shares, token_credit
from lit_reason.rewards.planted import PlantedReward

MODES = ("additive", "ratio", "abs", "softmax")


class Attending(PlantedReward):
    """A planted reward that claims to attend."""

    def attention(self, ids_L, start):
        return torch.arange(1.0, len(ids_L) - start + 1)


def sums_to(credit_BT, reward_B, valid_BT):
    filled = valid_BT.any(1)
    torch.testing.assert_close(credit_BT.sum(1)[filled], reward_B.double()[filled], rtol=0, atol=1e-5)
    assert not credit_BT[~valid_BT].any() and not credit_BT[~filled].any() and credit_BT.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MODES),
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    st.floats(-20, 20),
    st.integers(0, 4),
)
def test_every_mode_sums_to_the_reward_on_valid_tokens_alone(mode, amounts, reward, length):
    amount_BT = torch.tensor([amounts, amounts], dtype=torch.float64)
    valid_BT = torch.stack([torch.arange(4) < length, torch.ones(4, dtype=torch.bool)])
    reward_B = torch.tensor([reward, -reward], dtype=torch.float64)
    total = amount_BT.sum(1).abs()
    if mode == "ratio" and bool(
        ((total > 0) & (total < 1e-3)).any() or (amount_BT * valid_BT).sum(1).abs().min() < 1e-3
    ):
        return  # it blows up there: see below
    sums_to(token_credit(amount_BT, reward_B, valid_BT, mode), reward_B, valid_BT)
    sums_to(shares(amount_BT.abs(), reward_B, valid_BT), reward_B, valid_BT)


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("players", ["token", "span"])
def test_every_explainer_sums_to_the_reward(T, mode, players):
    reward = Attending(32, pairs=1.0, seed=T)
    attributor = Attributor(
        [*SHARES, *SIGNED], AttributionConfig(players=players, span_tokens=2, mode=mode), always=(31,)
    )
    response = [*range(3, 3 + T - 1), 31]
    found = attributor.explain(reward, [1, 2], response)
    assert found.credit_KT.shape == (7, T)
    torch.testing.assert_close(found.credit_KT.sum(1), torch.full((7,), found.reward).double(), rtol=0, atol=1e-5)
    for weights in torch.eye(7).tolist():
        assert float(mixed(torch.tensor(weights), found.credit_KT).sum()) == pytest.approx(found.reward, abs=1e-5)
    if T == 1:
        assert found.credit_KT[:, 0].tolist() == pytest.approx([found.reward] * 7)


def test_the_additive_mode_pays_the_rest_at_the_last_valid_token():
    valid = torch.tensor([[True, True, True, False]])
    credit = token_credit(torch.tensor([[1.0, -2.0, 0.5, 99.0]]), torch.tensor([3.0]), valid)
    assert credit.tolist() == [[1.0, -2.0, 0.5 + 3.5, 0.0]]


def test_without_the_residual_limes_credit_does_not_sum_to_the_reward(monkeypatch):
    """The mutation that matters: a residual that is dropped must be seen, and LIME is where it shows."""
    game = Interactions(8, 2)
    amounts = lime(game, 8, 256, generator())[None]
    reward, valid = game(torch.ones((1, 8), dtype=torch.bool)), torch.ones((1, 8), dtype=torch.bool)
    sums_to(token_credit(amounts, reward, valid), reward, valid)
    monkeypatch.setattr(module, "paid_out", lambda credit_BT, reward_B, valid_BT: credit_BT)
    with pytest.raises(AssertionError):
        sums_to(token_credit(amounts, reward, valid), reward, valid)


def test_ratio_blows_up_where_amounts_cancel_and_pays_at_the_end_where_they_cancel_exactly():
    valid, reward = torch.ones((1, 2), dtype=torch.bool), torch.tensor([1.0])
    near = token_credit(torch.tensor([[1.0, -0.999]]).double(), reward, valid, "ratio")
    assert near.abs().max() > 900
    assert token_credit(torch.tensor([[1.0, -1.0]]), reward, valid, "ratio").tolist() == [[0.0, 1.0]]
    assert token_credit(torch.tensor([[0.0, 0.0]]), reward, valid, "abs").tolist() == [[0.0, 1.0]]


def test_signs_are_kept_or_lost_as_the_modes_say():
    amounts, valid, reward = torch.tensor([[2.0, -1.0]]), torch.ones((1, 2), dtype=torch.bool), torch.tensor([-3.0])
    assert token_credit(amounts, reward, valid, "ratio").tolist() == [[-6.0, 3.0]]  # a negative reward flips all
    assert token_credit(amounts, reward, valid, "abs").tolist() == [[-2.0, -1.0]]
    assert token_credit(amounts, reward, valid)[0, 0] == 2.0
    soft = token_credit(amounts, reward, valid, "softmax", temperature=0.5)[0]
    assert soft.tolist() == pytest.approx((-3 * torch.tensor([4.0, -2.0]).softmax(0)).tolist())


def test_a_mix_of_explainers_is_linear_and_off_the_simplex_is_refused():
    credit = torch.tensor([[0.0, 0.0, 6.0], [2.0, 2.0, 2.0]]).double()
    assert mixed(torch.tensor([0.25, 0.75]), credit).tolist() == [1.5, 1.5, 3.0]
    for weights in ([0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(UserError, match="must not be negative and must sum to 1"):
            mixed(torch.tensor(weights), credit)
