"""Evaluation of models whose every word is known."""

from __future__ import annotations

import pytest
from rigged_model import WORDS, as_lm, bigram_llama, chain_llama, ids_of, random_llama, word_tokenizer

from lit_reason.core.evaluation import EvalPrompt, EvalResult, evaluate, solution_part
from lit_reason.errors import UserError
from lit_reason.metrics.intervals import wilson
from lit_reason.rewards.checkers import Checker, get_checker
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import Completion

EOS = WORDS.index("<eos>")


def prompt(text, answer=None, **metadata):
    return EvalPrompt(ids_of(text), f"row:{text}", text, answer, metadata)


def run(model, prompts, checker="numeric", k=(1,), **settings):
    names = ("part", "ranks")
    extra = {name: settings.pop(name) for name in names if name in settings}
    sampling = SamplingConfig(**{"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24, **settings})
    checker = get_checker(checker) if isinstance(checker, str) else checker
    return evaluate(
        as_lm(model),
        word_tokenizer(),
        prompts,
        sampling,
        checker,
        k,
        stop_ids=(EOS,),
        progress=False,
        **extra,
    )


CHAIN = chain_llama(
    "q <think> try 1 wait </think> so 5",  # closed trace, right
    "r 6",  # no trace, wrong
    "a b a",  # loops for ever
    "c d",  # a text without number
)
PROMPTS = [prompt("q", "5"), prompt("r", "7"), prompt("a", "1"), prompt("c", "1")]


def test_every_number_of_a_known_evaluation():
    result = run(CHAIN, PROMPTS)
    assert [r.completion for r in result.records] == [
        "<think> try 1 wait </think> so 5",
        "6",
        " ".join(["b a"] * 12),
        "d",
    ]
    assert [r.correct for r in result.records] == [True, False, False, False]
    assert [r.reason for r in result.records] == ["", "another number", "no number found", "no number found"]
    assert [r.trace for r in result.records] == ["closed", "none", "none", "none"]
    assert [r.row_id for r in result.records] == ["row:q", "row:r", "row:a", "row:c"]
    low, high = wilson(1, 4)
    assert result.metrics("val/") == pytest.approx(
        {
            "val/pass@1": 0.25,
            "val/pass@1_low": low,
            "val/pass@1_high": high,
            "val/closed": 0.75,
            "val/ended": 0.75,
            "val/traced": 0.25,
            "val/generated_tokens": (8 + 2 + 24 + 2) / 4,
            "val/repetition": 0.25,
            "val/checker_errors": 0.0,
        }
    )
    table = result.table()
    for piece in ("pass@1", "25.0%", f"[{low:.1%}, {high:.1%}]", "75.0%", "9.0", "no number found (2)"):
        assert piece in table
    assert "checker errors" not in table


def test_thoughts_that_never_end_give_no_answer():
    model = chain_llama("q <think> try 5", "r so 5", "b 1 </think> 6")
    prompts = [prompt("q", "5"), prompt("r", "5"), prompt("b", "1"), prompt("b", "6")]
    result = run(model, prompts)
    assert [r.trace for r in result.records] == ["open", "none", "closed", "closed"]
    assert [r.correct for r in result.records] == [False, True, False, True]
    assert result.records[0].reason == "thoughts never ended" and result.records[0].ended
    assert [r.closed for r in result.records] == [False, True, True, True]
    everything = run(model, prompts, part="all")
    assert [r.correct for r in everything.records] == [True, True, False, True]


def test_a_prompt_that_opens_the_trace():
    model = chain_llama("<think> try 5", "r <think>")
    (never,) = run(model, [prompt("q <think>", "5")]).records
    assert (never.trace, never.correct, never.closed) == ("open", False, False)
    model = chain_llama("<think> try </think> 5")
    (closed,) = run(model, [prompt("q <think>", "5")]).records
    assert (closed.trace, closed.correct, closed.closed) == ("closed", True, True)
    (mentioned,) = run(chain_llama("a 5"), [prompt("<think> a", "5")]).records  # not at the prompt's end
    assert (mentioned.trace, mentioned.correct) == ("none", True)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>1</think>2", False, ("2", "closed")),
        ("1</think>2", False, ("2", "closed")),
        ("1</think>2", True, ("2", "closed")),
        ("<think>1", False, ("", "open")),
        ("1", False, ("1", "none")),
        ("1", True, ("", "open")),
        ("[THINK]1[/THINK]2", False, ("2", "closed")),
    ],
)
def test_solution_part(text, opened, expected):
    assert solution_part(text, prompt_opens_trace=opened) == expected


def test_pass_at_k_and_its_interval_from_samples_of_a_known_model():
    model = bigram_llama({"q": {"5": 0.5, "6": 0.5}, "r": {"7": 1.0}, "c": {"8": 1.0}})
    prompts = [prompt("q", "5"), prompt("r", "7"), prompt("c", "1")]
    result = run(model, prompts, k=(1, 2, 4), samples=4, temperature=1.0)
    right = sum(r.correct for r in result.records[:4])
    assert 0 < right < 4  # else the seed makes this test say nothing
    of_q = {1: right / 4, 2: 1 - (4 - right) * (3 - right) / 12, 4: 1.0}
    for k, (rate, low, high) in result.pass_at.items():
        assert rate == pytest.approx((of_q[k] + 1 + 0) / 3)
        assert (low, high) == pytest.approx(wilson(of_q[k] + 1, 3))  # three prompts, not twelve samples
    assert [r.sample for r in result.records] == [0, 1, 2, 3] * 3
    assert list(result.pass_at) == [1, 2, 4] and "3 x 4 samples" in result.table()


def test_a_checker_that_raises_is_counted_apart_and_does_not_end_the_run():
    def check(text, answer, metadata):
        if metadata.get("poison"):
            raise KeyError("no such table")
        return text == "6"

    prompts = [prompt("r", None), prompt("r", None, poison=True)]
    with pytest.warns(UserWarning, match="failed on 1 of 2 completions.*row:r: KeyError: 'no such table'"):
        result = run(CHAIN, prompts, Checker("own", check, needs_answer=False))
    assert [(r.correct, r.error) for r in result.records] == [
        (True, ""),
        (False, "KeyError: 'no such table'"),
    ]
    assert result.checker_errors == 1 and result.metrics("")["checker_errors"] == 1
    assert result.metrics("")["pass@1"] == 0.5 and "checker errors" in result.table()
    with pytest.raises(UserError, match="checker 'own' failed on every completion; first row:r: KeyError"):
        run(CHAIN, prompts[1:], Checker("own", check, needs_answer=False))


def test_unusable_references_are_found_before_generating(monkeypatch):
    monkeypatch.setattr("lit_reason.core.evaluation.sample", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(UserError, match="can judge none of the 2 prompts; row:q: the row has no reference"):
        run(CHAIN, [prompt("q"), prompt("r")])
    with pytest.raises(UserError, match="'Paris' is not a number"):
        run(CHAIN, [prompt("q", "Paris")], "numeric:0.1")


def test_one_unusable_reference_among_others_is_a_checker_error():
    with pytest.warns(UserWarning, match="row:r: reference answer 'Paris' is not a number"):
        result = run(CHAIN, [prompt("q", "5"), prompt("r", "Paris")])
    assert result.checker_errors == 1 and result.metrics("")["pass@1"] == 0.5


@pytest.mark.parametrize(("k", "samples"), [((2,), 1), ((0,), 1), ((), 1), ((1, 5), 4)])
def test_k_must_fit_the_samples(k, samples):
    with pytest.raises(UserError, match="at most the number of samples"):
        run(CHAIN, PROMPTS, k=k, samples=samples)


def test_no_prompts():
    with pytest.raises(UserError, match="held-out data is empty"):
        run(CHAIN, [])


def test_split_over_processes_gives_the_same_result(monkeypatch):
    """Three processes played one after the other: what each would send is kept and handed to all."""
    import lit_reason.core.evaluation as evaluation

    model = random_llama()
    prompts = [prompt(p, "5") for p in ("a b c", "q", "r so", "q 4", "b")]
    settings = {"samples": 2, "temperature": 1.5, "k": (1, 2), "max_new_tokens": 6}
    alone = run(model, prompts, **settings)
    sent: list[list] = []

    def play(rank, exchange):
        monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(evaluation.dist, "all_gather_object", exchange)
        return run(model, prompts, ranks="split", **settings)

    def keep(parts, records):
        sent.append(records)
        parts[:] = [records] * len(parts)

    for rank in range(3):
        try:
            play(rank, keep)
        except IndexError:  # the pretended parts of the others are too short: only what was sent matters here
            pass
    assert [len(records) for records in sent] == [4, 4, 2]

    def deliver(parts, records):
        parts[:] = sent

    for rank in range(3):
        assert play(rank, deliver) == alone


def test_the_end_token_does_not_hide_a_loop(monkeypatch):
    looped = Completion(0, 0, ids_of("5 " * 20 + "<eos>"), "5 " * 20, True)
    monkeypatch.setattr("lit_reason.core.evaluation.sample", lambda *a, **k: [looped])
    (record,) = run(CHAIN, [prompt("q", "5")]).records
    assert record.repeats and record.ended and record.tokens == 21


def test_records_become_plain_values():
    (record,) = run(CHAIN, [prompt("q", "5")]).records
    assert record.to_dict() == {
        "row_id": "row:q",
        "sample": 0,
        "prompt": "q",
        "completion": "<think> try 1 wait </think> so 5",
        "answer": "5",
        "correct": True,
        "reason": "",
        "error": "",
        "tokens": 8,
        "ended": True,
        "trace": "closed",
        "repeats": False,
    }
    assert EvalResult((record,), 1).prompts == 1
