"""Players and masks: what is masked together, what is never masked, and what stands in its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.config import AttributionConfig, check_explainers
from lit_reason.rewards.attribution.game import Game
from lit_reason.rewards.attribution.masking import masked_copies
from lit_reason.rewards.attribution.players import NOBODY, count, players_of, spread

WORDS = {
    10: "First",
    11: " step.",
    12: " Then",
    13: " another",
    14: " one.",
    15: "\n\n",
    16: "A new thought here.",
    2: "",
}


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def test_tokens_and_spans():
    assert players_of([5, 6, 7], "token").tolist() == [0, 1, 2]
    assert players_of([5, 6, 7, 8, 9], "span", span_tokens=2).tolist() == [0, 0, 1, 1, 2]
    assert count(players_of([], "token")) == 0


def test_the_end_token_is_never_a_player_and_only_at_the_end():
    assert players_of([2, 6, 2], "token", always=(2,)).tolist() == [0, 1, NOBODY]


def test_sentences_and_thoughts_come_from_the_text():
    ids = [10, 11, 12, 13, 14, 15, 16, 2]
    by_sentence = players_of(ids, "sentence", always=(2,), decode=decode).tolist()
    by_thought = players_of(ids, "thought", always=(2,), decode=decode).tolist()
    assert by_thought == [0, 0, 0, 0, 0, 0, 1, NOBODY]
    assert by_sentence[0] == by_sentence[1] and by_sentence[6] == max(by_sentence) > 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_spreading_keeps_the_sum_and_gives_a_players_tokens_equal_parts(steps):
    player_T = torch.unique(torch.tensor(steps), return_inverse=True)[1]
    amount_P = torch.arange(1.0, count(player_T) + 1).double()
    spread_T = spread(amount_P, torch.cat([player_T, torch.tensor([NOBODY])]))
    assert float(spread_T.sum()) == pytest.approx(float(amount_P.sum())) and spread_T[-1] == 0
    for player in range(count(player_T)):
        assert len(set(spread_T[:-1][player_T == player].tolist())) == 1


PRESENT = torch.tensor([[True, False, True]])


@pytest.mark.parametrize(
    ("masking", "ids", "seen"),
    [
        ("pad", [9, 8, 5, 6, 7], [1, 1, 1, 0, 1]),
        ("token", [9, 8, 5, 0, 7], [1, 1, 1, 1, 1]),
        ("reference", [9, 8, 5, 4, 7], [1, 1, 1, 1, 1]),
        ("delete", [9, 8, 5, 7, 6], [1, 1, 1, 1, 0]),
    ],
)
def test_masked_copies(masking, ids, seen):
    found = masked_copies([9, 8], [5, 6, 7], PRESENT, masking, fill_id=0, reference=[3, 4])
    assert found[0].tolist() == [ids] and found[1].int().tolist() == [seen]


def test_a_mask_without_a_stand_in_is_refused():
    with pytest.raises(UserError, match="2 of 3 tokens have a stand-in"):
        masked_copies([9], [5, 6, 7], PRESENT, "reference", reference=[3, 4])
    with pytest.raises(UserError, match="needs attribution.fill_id"):
        AttributionConfig(masking="token")


def test_a_game_scores_each_coalition_once_in_batches():
    sizes = []

    def score(ids, seen):
        sizes.append(len(ids))
        return (ids * seen).sum(1).double()

    game = Game(score, [1], [5, 6, 7], players_of([5, 6, 7], "token"), batch=2)
    rows = torch.tensor([[True, True, True], [True, False, False], [True, True, True], [False, False, False]])
    assert game(rows).tolist() == [19, 6, 19, 1] and sizes == [2, 1]
    assert game.whole == 19 and game.base == 1 and sizes == [2, 1] and game.calls == 3
    assert game.scored_prefixes().tolist() == [1, 6, 12, 19]


@pytest.mark.parametrize("answer", [torch.tensor([float("nan")]), torch.zeros(1, 2)])
def test_a_reward_that_is_no_finite_number_is_refused(answer):
    with pytest.raises(UserError, match="one finite number each"):
        _ = Game(lambda ids, seen: answer, [1], [5], players_of([5], "token")).whole


@pytest.mark.parametrize("names", [["final", "shapp"], ["shap", "shap"], []])
def test_explainers_that_are_none_or_stand_twice_are_refused(names):
    with pytest.raises(UserError, match="did you mean 'shap'|named twice|no explainer"):
        check_explainers(names)


@pytest.mark.parametrize("wrong", [{"fraction": 1.5}, {"evaluations": 0}, {"temperature": 0.0}])
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AttributionConfig(**wrong)
