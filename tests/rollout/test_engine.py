"""The multi-turn engine against plain forward passes over each row alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigged_model import WORDS, chain_llama, ids_of, random_llama, word_tokenizer

from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.broken_output import broken_output
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.kv_slots import KVSlots

EOS = WORDS.index("<eos>")
PROMPTS = [ids_of(p) for p in ("a b c d", "q", "r so try 1 2 3")]


def engine(hf=None, stop_ids=(EOS,), **sampling) -> Engine:
    lm = LanguageModel(hf or random_llama(), ModelConfig())
    chosen = {"temperature": 1.0, "top_p": 1.0, **sampling}
    return Engine(lm, word_tokenizer(), SamplingConfig(**chosen), stop_ids)


def alone(hf, ids, temperature=1.0):
    """Log-probability of each token after the first, without cache, padding, batch or holes."""
    with torch.no_grad():
        logits = hf.eval()(torch.tensor([ids])).logits[0].float() / temperature
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def played(run, copies=2, turns=3, seed=0, limits=(2, 7)):
    """Several turns with observations of very different lengths; what was sampled, by row and place."""
    rng = random.Random(seed)
    run.open(PROMPTS)
    run.fork(copies)
    sampled = []
    for _ in range(turns):
        n = len(PROMPTS) * copies
        starts = [len(run.ids(i)) for i in range(n)]
        for i, turn in enumerate(run.step([rng.randint(*limits) for _ in range(n)])):
            sampled.append((i, starts[i], turn))
        for i in range(n):
            run.append(i, [rng.randrange(len(WORDS)) for _ in range(rng.choice([1, 2, 9]))])
    return sampled


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_each_row_alone(temperature):
    run = engine(temperature=temperature)
    sampled = played(run)
    rows = [run.ids(i) for i in range(6)]
    assert len({tuple(row) for row in rows}) == 6
    for i, start, turn in sampled:
        assert rows[i][start : start + len(turn.ids)] == turn.ids
        expected = alone(run.lm.hf, rows[i], temperature)[start - 1 : start - 1 + len(turn.ids)]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=2e-6)


def test_no_token_is_computed_twice():
    run, seen = engine(), []
    run.lm.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum())
        ),
        with_kwargs=True,
    )
    played(run, copies=3)
    rows = [run.ids(i) for i in range(9)]
    pending = sum(len(row.pending) for row in run._rows)
    shared = 2 * sum(len(p) - 1 for p in PROMPTS)  # each prompt once for its three copies, but for its last token
    assert sum(seen) == sum(len(row) for row in rows) - pending - shared


def test_a_row_that_is_done_leaves_the_batch():
    run, rows = engine(stop_ids=(99,)), []
    run.lm.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run.open(PROMPTS)
    run.step([1, 4, 2])
    assert rows == [3, 2, 1, 1]
    run.append(1, [3, 4])
    run.step([0, 1, 0])
    assert rows[4:] == [1]
    turns = run.step([3, 3, 3])
    for i, turn in enumerate(turns):
        expected = alone(run.lm.hf, run.ids(i))[-3:]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=2e-6)


def test_holes_are_closed_when_that_helps_and_not_for_every_token(monkeypatch):
    calls, select = [], KVSlots.select
    monkeypatch.setattr(KVSlots, "select", lambda slots, rows: (calls.append(len(rows)), select(slots, rows)))
    run = engine(stop_ids=(99,))
    run.open([[3], [4] * 60])
    run.step([20, 20])
    assert calls == []  # one row is three times as long as the other, and nothing is gained by moving either
    for _ in range(6):  # rows take turns to be told much: all of it is a hole in the other row
        run.append(0, [5] * 8)
        run.step([1, 0])
        run.append(1, [5] * 8)
        run.step([0, 1])
    assert 1 <= len(calls) <= 3
    longest = max(len(run.ids(i)) for i in (0, 1))
    assert run._slots.mask_BC.shape[1] <= longest / 0.75 + 9


def test_what_a_row_writes_does_not_depend_on_its_neighbours():
    together = played(engine(), copies=1)
    run = engine()
    limits = [random.Random(0).randint(2, 7) for _ in range(1)]
    run.open([PROMPTS[0]])
    (turn,) = run.step(limits)
    assert turn.ids == together[0][2].ids and len(turn.ids) > 1


def test_streams_differ_by_rollout_turn_seed_and_name():
    def first_turns(run, prompts, copies, names=None):
        run.open(prompts, names)
        run.fork(copies)
        return [tuple(t.ids) for t in run.step([8] * (len(prompts) * copies))]

    four = first_turns(engine(temperature=4.0), [PROMPTS[0]], 4)
    assert len(set(four)) == 4
    assert first_turns(engine(temperature=4.0), [PROMPTS[0]], 4) == four
    assert first_turns(engine(temperature=4.0, seed=1), [PROMPTS[0]], 4) != four
    twice = first_turns(engine(temperature=4.0), [PROMPTS[0], PROMPTS[0]], 1)
    assert twice[0] != twice[1] and twice[0] == four[0]
    swapped = first_turns(engine(temperature=4.0), [PROMPTS[0], PROMPTS[0]], 1, ["1", "0"])
    assert swapped == twice[::-1]  # the name decides, not the place
    run = engine(temperature=4.0)
    run.open([PROMPTS[0]])
    draws = {tuple(run.step([8])[0].ids) for _ in range(3)}
    assert len(draws) == 3


def test_a_fork_in_mid_dialogue_shares_what_came_before():
    run = engine()
    run.open(PROMPTS)
    run.step([3, 5, 1])
    before = [run.ids(i) for i in range(3)]
    run.fork(2)
    turns = run.step([6] * 6)
    for i, turn in enumerate(turns):
        assert run.ids(i) == before[i // 2] + turn.ids
        expected = alone(run.lm.hf, run.ids(i))[len(before[i // 2]) - 1 :]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=2e-6)
    assert turns[0].ids != turns[1].ids


def test_dropping_rows_leaves_the_others_as_they_were():
    kept, whole = engine(temperature=0.0), engine(temperature=0.0)
    for run in (kept, whole):
        run.open(PROMPTS)
        run.step([4, 2, 6])
    kept.keep([2, 0])
    turns = whole.step([5] * 3)
    assert [t.ids for t in kept.step([5, 5])] == [turns[2].ids, turns[0].ids]
    assert kept.ids(0) == whole.ids(2)


@pytest.mark.parametrize("limits", [[0, 3, 2], [0, 0, 0]])
def test_a_row_without_room_writes_nothing(limits):
    run = engine()
    run.open(PROMPTS)
    turns = run.step(limits)
    assert [len(t.ids) for t in turns] == limits
    assert {t.stop for t, n in zip(turns, limits, strict=True) if n == 0} == {"length"}
    again = run.step([2, 2, 2])
    for i in range(3):
        start = len(PROMPTS[i]) + limits[i]
        expected = alone(run.lm.hf, run.ids(i))[start - 1 :]
        torch.testing.assert_close(torch.tensor(again[i].logprobs), expected, rtol=0, atol=2e-6)


def test_turns_that_have_ended_are_answered_while_others_go_on():
    told, limits, turns = [[3, 4, 5], [6], [7, 8]], [2, 9, 3], 3

    def by_waves(run):
        """Turns of each row, and the rows of each pass."""
        rows = []
        run.lm.base.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        found = [[] for _ in PROMPTS]
        while any(len(turns_of) < turns for turns_of in found):
            begun = [n * (len(f) < turns) for n, f in zip(limits, found, strict=True)]
            for i, turn in run.first_turns(begun).items():
                if len(found[i]) < turns:
                    found[i].append(turn)
                    run.append(i, told[i])
        return found, rows

    run = engine(stop_ids=(99,))
    run.open(PROMPTS)
    found, rows = by_waves(run)
    plain = engine(stop_ids=(99,))
    plain.open(PROMPTS)
    for k in range(turns):
        for i, turn in enumerate(plain.step(limits)):
            assert found[i][k].ids == turn.ids  # when a turn was written, and beside whom, changes nothing
            plain.append(i, told[i])
    for i in range(3):
        at = len(PROMPTS[i])
        for turn in found[i]:
            expected = alone(run.lm.hf, run.ids(i))[at - 1 : at - 1 + len(turn.ids)]
            torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=2e-6)
            at += len(turn.ids) + len(told[i])
    longest = turns * max(limits)
    assert sum(shape[1] == 1 for shape in rows) <= longest  # nobody waited for the longest turn of each round


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_an_output_that_is_no_number_names_its_place_and_its_cause(temperature):
    run = engine(temperature=temperature, stop_ids=(99,))
    run.open(PROMPTS, ["x", "y", "z"])
    run.fork(2)
    run.step([2] * 6)
    weight = run.lm.base.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"prompt 'x', rollout 0, turn 1, token 0: .* first of them model.layers.1.mlp"):
        run.step([2] * 6)
    with torch.no_grad():
        weight.fill_(1e308)
    run.open(PROMPTS)
    with pytest.raises(UserError, match="its weights are finite, but its activations are not"):
        run.step([2] * 3)


def test_an_overflow_of_half_precision_is_told_from_divergence():
    said = str(broken_output(torch.nn.Linear(2, 2), "here", torch.float16))
    assert said.startswith("here: ") and "float16 ends at 65504" in said and "diverged" not in said


def test_a_round_lays_matrices_out_for_decoding_and_back_again():
    run = engine(random_llama().float())
    weights = {name: (p, p.data.clone(), p.stride()) for name, p in run.lm.hf.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), run.round(0):
        for name, (p, before, stride) in weights.items():
            assert torch.equal(p, before)
            assert (p.stride() != stride) == ("proj" in name or "lm_head" in name), name
        raise RuntimeError("stop")
    assert all(p.stride() == stride and torch.equal(p, before) for p, before, stride in weights.values())


def test_an_end_token_is_part_of_the_turn_but_not_of_its_text():
    run = engine(chain_llama("q 1 2 <eos>", "r so 3"), temperature=0.0)
    run.open([ids_of("a q"), ids_of("r")])
    first, second = run.step([9, 2])
    assert (first.ids, first.text, first.stop) == (ids_of("1 2 <eos>"), "1 2", "end")
    assert (second.ids, second.text, second.stop) == (ids_of("so 3"), "so 3", "length")


def test_a_stop_string_ends_the_turn_wherever_it_lies_in_a_token():
    run = engine(chain_llama("q try wait </think> so"), temperature=0.0)
    run.open([ids_of("q")])
    (turn,) = run.step([9], ["ait </th", "never"])
    assert turn.ids == ids_of("try wait </think>")  # the whole token was sampled, so the whole token stays
    assert turn.text == "try wait </th" and turn.stop == "ait </th"


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_any_dialogue_gives_the_log_probabilities_of_a_fresh_pass(seed, copies, turns):
    run = engine(seed=seed)
    for i, start, turn in played(run, copies, turns, seed, limits=(0, 5)):
        expected = alone(run.lm.hf, run.ids(i))[start - 1 : start - 1 + len(turn.ids)]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=5e-6)


def test_modes_are_as_before_and_training_goes_on():
    run = engine()
    run.lm.train()
    with torch.inference_mode():
        run.open(PROMPTS)
        run.fork(2)
        run.step([2] * 6)
        run.keep([0, 3, 4])
        run.append(0, [3, 4])
        run.step([4, 1, 6])
    assert run.lm.hf.training
    run.lm.hf(torch.tensor([PROMPTS[0]])).logits.sum().backward()


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(UserError, match="no end token"):
        engine(stop_ids=())
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine().open([[1], []])
    window = random_llama()
    window.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UserError, match="full attention in every layer.*sliding_attention"):
        engine(window).open([[1]])
