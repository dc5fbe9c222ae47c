"""Features are the states they say they are, and what a bank holds depends on nothing but the features."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_steering import llama, lm

from lit_reason.errors import UserError
from lit_reason.steering.bank import FeatureBank, Features
from lit_reason.steering.collect import collected, contrast_states, segment_features
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.finder import check_direction, solve, watched_layers
from lit_reason.steering.judge import WordJudge, distinct
from lit_reason.steering.probe import fit_probe, folds_of, out_of_fold

STATES = torch.arange(2 * 3 * 10.0).view(10, 2, 3)  # 10 tokens, 2 layers, width 3
LENGTHS = [5, 2, 3]


def test_token_segments():
    cut = segment_features(STATES, LENGTHS, "token", 1, 2)
    assert torch.equal(cut.features_NLF, STATES[[1, 2, 6, 8, 9]])
    assert cut.text_N.tolist() == [0, 0, 1, 2, 2] and cut.place_N.tolist() == [1, 2, 1, 1, 2] and cut.short == []
    torch.testing.assert_close(cut.norms_NL, STATES[[1, 2, 6, 8, 9]].norm(dim=-1))


def test_mean_segments():
    cut = segment_features(STATES, LENGTHS, "mean", 2, None)
    torch.testing.assert_close(cut.features_NLF, torch.stack([STATES[2:5].mean(0), STATES[9]]))
    assert cut.text_N.tolist() == [0, 2] and cut.short == [1]
    torch.testing.assert_close(cut.norms_NL[0], STATES[2:5].norm(dim=-1).mean(0))


def test_concat_segments_need_their_whole_length():
    cut = segment_features(STATES, LENGTHS, "concat", 1, 2)
    assert cut.short == [1] and cut.text_N.tolist() == [0, 2]
    assert torch.equal(cut.features_NLF[0, 1].view(2, 3), STATES[1:3, 1])


def test_all_texts_too_short_leave_nothing():
    cut = segment_features(STATES, LENGTHS, "concat", 4, 3)
    assert cut.short == [0, 1, 2] and cut.features_NLF.shape == (0, 2, 9) and len(cut.text_N) == 0


def test_collected_states_are_those_of_transformers():
    model, ids = llama(), torch.tensor([[3, 1, 4, 1, 5]])
    model(input_ids=ids, output_hidden_states=True)  # transformers puts hooks of its own there, once
    before = [len(layer._forward_hooks) for layer in model.model.layers]
    with torch.no_grad(), collected(model, [0, 1]) as states:
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.equal(states[layer], expected[layer + 1])
    with pytest.raises(ValueError), collected(model, [0]):
        raise ValueError
    assert [len(layer._forward_hooks) for layer in model.model.layers] == before
    with pytest.raises(UserError, match="layer 3: this model has 3 decoder layers, 0 to 2"), collected(model, [3]):
        pass


class Letters:
    """A tokenizer of single letters; a blank is 0."""

    def __call__(self, text: str, **settings):
        return SimpleNamespace(input_ids=[0 if c == " " else ord(c) - ord("a") + 1 for c in text])


def test_a_contrast_is_the_towards_prompt_less_the_other_filled_with_blanks():
    model = lm()
    found = contrast_states(model, Letters(), {"x": ["love", "no"]}, [0, 2], ["x", "y"])
    rows = torch.tensor([[12, 15, 22, 5], [14, 15, 0, 0]])
    with torch.no_grad(), collected(model.base, [0, 2]) as states:
        model.hf(input_ids=rows)
    for at, layer in enumerate((0, 2)):
        towards, away = states[layer]
        torch.testing.assert_close(found["x"][at], towards - away, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"direction.contrast: 'xx' is no class \(did you mean 'x'\?\); they are x, y"):
        contrast_states(model, Letters(), {"xx": ["a", "b"]}, [0], ["x", "y"])
    with pytest.raises(UserError, match="direction.contrast.x has 1 prompts; give two, towards and from"):
        contrast_states(model, Letters(), {"x": ["a"]}, [0], ["x", "y"])


def some_features(n: int, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((n, 1, 2))).float()
    rows = np.arange(n) // 3
    return Features(x, x.norm(dim=-1), rows % 2, rows, np.arange(n) % 3)


def part(features: Features, numbers) -> Features:
    numbers = np.asarray(numbers, dtype=np.int64)
    return Features(*(column[numbers] for column in features))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(30)), st.integers(1, 29), st.integers(1, 12), st.booleans())
def test_a_bank_knows_no_order_and_no_doubles(order, cut, cap, twice):
    whole = some_features(30)
    reference = FeatureBank(cap, 7)
    reference.add(whole)
    one, other = FeatureBank(cap, 7), FeatureBank(cap, 7)
    one.add(part(whole, order[:cut]))
    other.add(part(whole, order[cut:]))
    if twice:
        other.add(part(whole, order[cut - 1 :]))
    one.merge([other.state(), other.state()])
    for a, b in zip(one.content(), reference.content(), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    counts = np.bincount(one.content().labels_N)
    assert counts.tolist() == [min(cap, 15), min(cap, 15)]


def test_a_bank_stays_small_and_its_draw_is_fair():
    bank, seen = FeatureBank(50, 0), 0
    for number in range(200):
        batch = some_features(30, number)
        bank.add(batch._replace(rows_N=batch.rows_N + 10 * number))
        seen = max(seen, sum(len(p.labels_N) for p in bank._parts))
    assert seen <= 2 * 50 + 50 + 30
    rows = bank.content().rows_N
    assert len(rows) == 100 and 800 < rows.mean() < 1200  # of 0 to 1999


def test_folds_keep_texts_whole_and_classes_even():
    rows = np.repeat(np.arange(20), 4)
    labels = np.repeat(np.arange(20) % 2, 4)
    parts = folds_of(labels, rows, 5, 0, ["x", "y"])
    assert all(len(set(parts[rows == row])) == 1 for row in range(20))
    assert {tuple(np.bincount(parts[labels == k])) for k in (0, 1)} == {(8, 8, 8, 8, 8)}
    with pytest.raises(UserError, match="class 'y' has one text.*direction.folds"):
        folds_of(np.array([0, 0, 1]), np.array([0, 1, 2]), 2, 0, ["x", "y"])


def test_out_of_fold_confidence_is_not_inflated():
    """On noise, a probe that has seen its features is sure of them; one that has not is at chance."""
    x = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    labels, rows = np.arange(60) % 2, np.arange(60)
    names = ["x", "y"]
    own = torch.from_numpy(labels)
    log_NK = out_of_fold(x, labels, rows, names, 0.01, 5, 0)
    assert -log_NK[torch.arange(60), own].mean() > 0.69  # log 2: knows nothing
    assert -fit_probe(x, own, 2, 0.01).log_probs(x)[torch.arange(60), own].mean() < 0.1


def layered_bank(signal: list[float], texts: int = 40) -> FeatureBank:
    """A bank of two classes that are so far apart at each layer."""
    rng = torch.Generator().manual_seed(0)
    labels = np.arange(texts) % 2
    gaps = torch.tensor(signal)[None, :, None] * torch.from_numpy(2.0 * labels - 1)[:, None, None]
    x = (torch.randn(texts, len(signal), 4, generator=rng) + gaps).float()
    bank = FeatureBank(100, 0)
    bank.add(Features(x, x.norm(dim=-1), labels, np.arange(texts), np.ones(texts, dtype=np.int64)))
    return bank


def test_the_layer_whose_probe_knows_best_is_taken():
    found = solve(layered_bank([0.1, 1.5, 0.4]), [2, 5, 8], ["x", "y"], DirectionConfig(), width=4, facts={"model": {}})
    losses = found.facts["probe_loss_by_layer"]
    assert found.layer == 5 and min(losses, key=losses.get) == "5" and found.facts["probe_accuracy"] > 0.95
    assert found.facts["texts"] == {"x": 20, "y": 20}
    assert found.facts["kept_by_beta"]["x"]["0.5"] == found.facts["counts"]["x"]["selected"]
    assert found.residual_norm == float(layered_bank([0.1, 1.5, 0.4]).content().norms_NL[:, 1].median())


def test_contrasts_are_those_of_the_taken_layer_and_of_no_other_class():
    of_layers = torch.arange(3.0)[:, None, None].expand(3, 2, 4) + 1
    config, contrasts = DirectionConfig(method="act_add"), {"x": of_layers}
    found = solve(layered_bank([0.1, 1.5, 0.4]), [2, 5, 8], ["x", "y"], config, width=4, facts={}, contrasts=contrasts)
    assert list(found.vectors) == ["x"] and torch.equal(found.vectors["x"], torch.full((2, 4), 2.0))
    assert found.laid_from == 0 and found.facts["first"] == 1


def test_a_class_without_features_is_named():
    with pytest.raises(UserError, match="class 'z' has no text that is long enough: the segment begins at position 1"):
        solve(layered_bank([1.0]), [0], ["x", "y", "z"], DirectionConfig(), width=4, facts={})
    with pytest.raises(UserError, match="class 'x' has no text that is long enough"):
        solve(FeatureBank(100, 0), [0], ["x", "y"], DirectionConfig(), width=4, facts={})


def test_concat_directions_have_a_piece_for_each_token():
    config = DirectionConfig(segment="concat", length=2)
    assert solve(layered_bank([1.0]), [0], ["x", "y"], config, width=2, facts={}).vectors["x"].shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.0}, "direction.beta is 1.0; it must be a probability"),
        ({"folds": 1}, "direction.folds is 1; it must be 0, or 2 and more"),
        ({"length": 0}, "direction.length is 0"),
        ({"segment": "concat"}, "segment concat needs direction.length"),
        ({"method": "caa", "segment": "mean"}, "caa reads the last token"),
        ({"penalty": 0.0}, "direction.penalty is 0.0; it must be above 0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        check_direction(DirectionConfig(**change))


def test_watched_layers_are_spread_over_the_model():
    model = llama(num_hidden_layers=30, hidden_size=4, intermediate_size=4, num_attention_heads=1)
    assert watched_layers(DirectionConfig(), model) == [1, 5, 9, 13, 16, 20, 24, 28]
    assert watched_layers(DirectionConfig(layer=3), model) == [3]
    assert watched_layers(DirectionConfig(layers=[9, 2, 9]), model) == [2, 9]
    assert watched_layers(DirectionConfig(), llama(num_hidden_layers=1)) == [0]


def test_the_judge_knows_words():
    texts = ["the cake and the soup", "a soup with bread", "a judge in court", "the court and the law"]
    judge = WordJudge(texts, [0, 0, 1, 1], 2)
    assert judge(["More soup, please!", "The COURT rose."]) == [0, 1]
    assert judge([]) == []
    assert torch.allclose(judge.probs(["zzz"]).sum(), torch.tensor(1.0))


def test_distinct_counts_different_pairs():
    assert distinct(["so it is so it is"], 2) == 3 / 5
    assert distinct(["one two", "one two"], 1) == 0.5 and distinct([""], 2) == 0.0
