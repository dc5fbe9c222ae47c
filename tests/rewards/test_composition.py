"""Rewards by name: where each is paid, how they add up, and what is refused before anything runs."""

import math

import numpy as np
import pytest
import torch

from lit_reason.errors import UserError
from lit_reason.rewards.checkers import Verdict
from lit_reason.rewards.composition import Paid, RewardError, Rewards, find_reward
from lit_reason.rewards.dialogue import Dialogue, Turn

TWO = Dialogue({"answer": "7"}, (Turn("think", "go on", {}), Turn("it is 7", "", {"answer": "7"})), True)
OWN = Paid([{"useful": 0.5}, {}], {"correct": 1.0})


def rewards_of(monkeypatch, tmp_path, body, weights):
    name = f"own_{abs(hash(body)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Rewards({f"{name}:{function}": weight for function, weight in weights.items()}), name


def test_without_a_list_the_environment_pays():
    assert Rewards().pay(TWO, OWN) == OWN
    assert Rewards({"environment": 3.0}).pay(TWO, OWN) == Paid([{"useful": 1.5}, {}], {"correct": 3.0})
    assert Rewards({}).pay(TWO, OWN) == Paid([{}, {}], {})


def test_a_function_of_the_users_own_pays_turns_or_the_whole(monkeypatch, tmp_path):
    body = "def per_turn(d):\n    return [len(t.text) for t in d.turns]\ndef whole(d):\n    return d.finished\n"
    rewards, name = rewards_of(monkeypatch, tmp_path, body, {"per_turn": 0.1, "whole": -2.0})
    paid = rewards.pay(TWO, OWN)
    assert [list(terms) for terms in paid.turns] == [[f"{name}:per_turn"]] * 2
    assert [sum(terms.values()) for terms in paid.turns] == pytest.approx([0.5, 0.7])
    assert paid.outcome == {f"{name}:whole": -2.0}


@pytest.mark.parametrize(
    ("value", "pays"),
    [
        ([1, 2], [1.0, 2.0]),
        ((True, False), [1.0, 0.0]),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (np.float32(2.0), 2.0),
        (torch.tensor(2.0), 2.0),
        (True, 1.0),
        (Verdict(True), 1.0),
    ],
    ids=str,
)
def test_numbers_of_any_kind_are_paid(monkeypatch, value, pays):
    monkeypatch.setattr("lit_reason.rewards.composition.find_reward", lambda name: lambda dialogue: value)
    paid = Rewards({"it": 1.0}).pay(TWO, OWN)
    assert paid == (Paid([{"it": p} for p in pays], {}) if isinstance(pays, list) else Paid([{}, {}], {"it": pays}))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "reward 'it' is nan"),
        ([0.0, -math.inf], "reward 'it' of turn 1 is -inf"),
        ([1.0], "'it' gave 1 numbers for 2 turns"),
        (np.zeros(3), "'it' gave 3 numbers for 2 turns"),
        (["a", 1], "of turn 0 is 'a'"),
        ("12", "is '12'; it must be a number"),
        (None, "is None; it must be a number"),
        ({"a": 1}, "it must be a number"),
    ],
    ids=str,
)
def test_what_cannot_be_paid_is_named(monkeypatch, value, says):
    monkeypatch.setattr("lit_reason.rewards.composition.find_reward", lambda name: lambda dialogue: value)
    with pytest.raises(RewardError, match=says):
        Rewards({"it": 1.0}).pay(TWO, OWN)


def test_what_the_environment_pays_must_be_finite_too():
    with pytest.raises(RewardError, match="'useful' of turn 0 is nan"):
        Rewards().pay(TWO, Paid([{"useful": math.nan}, {}], {}))
    with pytest.raises(RewardError, match="'correct' is inf"):
        Rewards().pay(TWO, Paid([{}, {}], {"correct": math.inf}))


def test_checkers_are_rewards():
    assert find_reward("checker:numeric")(TWO) == 1.0
    wrong = Dialogue({"answer": "8"}, TWO.turns, True)
    assert find_reward("checker:numeric")(wrong) == 0.0
    unfinished = Dialogue({"answer": "7"}, (Turn("so 7", "", {}),), False)  # no answer reported: the turn is read
    assert find_reward("checker:numeric")(unfinished) == 1.0
    with pytest.raises(RewardError, match="UserError: the row has no reference answer"):
        Rewards({"checker:exact": 1.0}).pay(Dialogue({}, TWO.turns, True), OWN)


def test_mistakes_are_found_before_anything_runs():
    with pytest.raises(UserError, match="reward is 'exact_mach'.*did you mean 'exact_match'"):
        Rewards({"exact_mach": 1.0})
    with pytest.raises(UserError, match="did you mean 'numeric'"):
        Rewards({"checker:numerik": 1.0})
    with pytest.raises(UserError, match="rewards.executed is nan"):
        Rewards({"executed": math.nan})
    with pytest.raises(UserError, match="no module 'nowhere'"):
        Rewards({"nowhere:f": 1.0})
