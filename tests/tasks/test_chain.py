"""The chain task against an independent solver that reads only the text."""

import json
import math
import re

import pytest

from lit_reason.errors import UserError
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems

CONFIGS = {
    "demo": chain.ChainConfig(),
    "two links": chain.ChainConfig(symbols=5, modulus=7, links=2, middle_min=5, middle_max=9),
    "half used": chain.ChainConfig(used_share=0.5),
    "all used": chain.ChainConfig(middle_min=8, used_share=1.0),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def rows(config, n=200, seed=3, held_out=False):
    return [chain.record(config, seed, i, held_out=held_out) for i in range(n)]


def read(row):
    """Values, operands and extras of a prompt; head, middle and tail of a trace; the answer."""
    question, reply = (message["content"] for message in row["messages"])
    given, asked = re.fullmatch(r"given (.*) add (.*)", question).groups()
    operands, _, extras = asked.partition(" then ")
    values = {pair[0]: int(pair[1:]) for pair in given.split()}
    trace, solution = re.fullmatch(r"<think>(.*)</think> (\d+)", reply, re.DOTALL).groups()
    parts = {"is": [], "so": [], "middle": []}
    for thought in trace.split("\n\n"):
        first = thought.split()[0]
        parts[first if first in parts else "middle"].append(thought)
    order = [t.split()[0] if t.split()[0] in ("is", "so") else "middle" for t in trace.split("\n\n")]
    return values, operands.split(), extras.split(), parts, order, solution


def test_the_answer_is_the_sum_of_what_the_prompt_says(config):
    for row in rows(config):
        values, operands, extras, _, _, solution = read(row)
        assert set(values) == set(config.letters)
        assert len(set(operands)) == config.links + 1
        total = sum(values[s] for s in operands + extras) % config.modulus
        assert row["answer"] == solution == str(total)


def test_understanding_then_exploration_then_convergence(config):
    for row in rows(config):
        _, _, _, parts, order, _ = read(row)
        assert order == ["is"] * (config.links + 1) + ["middle"] * len(parts["middle"]) + ["so"] * config.links
        assert config.middle_min <= len(parts["middle"]) <= config.middle_max
        assert all(re.match(r"(wait|but|hmm|alternatively|meanwhile) ", t) for t in parts["middle"])


def test_every_equation_holds_and_every_value_is_the_given_one(config):
    for row in rows(config):
        values, _, _, parts, _, _ = read(row)
        for thought in parts["is"] + parts["middle"]:
            for symbol, value in re.findall(r"\b([a-z]) (\d+)", thought):
                assert values[symbol] == int(value), thought
        for thought in parts["middle"] + parts["so"]:
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert (numbers[0] + numbers[1]) % config.modulus == numbers[2], thought


def test_the_tail_follows_from_the_head_and_the_used_middle(config):
    for row in rows(config):
        values, operands, extras, parts, _, solution = read(row)
        decoded = [(t.split()[1], int(t.split()[2].rstrip("."))) for t in parts["is"]]
        assert [s for s, _ in decoded] == operands
        total = decoded[0][1]
        used = [t for t in parts["middle"] if t.startswith("meanwhile")]
        assert [t.split()[3] for t in used] == extras
        for thought in used:
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert numbers[0] == total
            total = numbers[2]
        for thought, (_, value) in zip(parts["so"], decoded[1:], strict=True):
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert numbers[:2] == [total, value]
            total = numbers[2]
        assert str(total) == solution


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_used_share_is_the_share_of_the_middle_that_feeds_the_tail(share):
    config = chain.ChainConfig(used_share=share)
    for row in rows(config, 100):
        _, _, extras, parts, _, _ = read(row)
        used = sum(t.startswith("meanwhile") for t in parts["middle"])
        assert used == len(extras) == round(share * len(parts["middle"]))


def test_the_numbers_of_middle_thoughts_cover_the_range():
    counts = {len(read(row)[3]["middle"]) for row in rows(chain.ChainConfig(), 300)}
    assert counts == set(range(6, 13))


@pytest.mark.parametrize("name", ["demo", "two links"])
def test_the_edges_at_half_keep_all_that_the_answer_needs(name):
    config = CONFIGS[name]
    for row in rows(config):
        _, _, _, parts, order, _ = read(row)
        n = len(order)
        kept = max(2, math.ceil(0.5 * n))
        tail = kept // 2
        cut = order[: kept - tail] + order[n - tail :]
        assert cut.count("is") == len(parts["is"]) and cut.count("so") == len(parts["so"])


def test_held_out_assignments_are_never_trained_on_whatever_the_seed(config):
    def assignments(held_out):
        found = set()
        for seed in (0, 1):
            for row in rows(config, 300, seed, held_out):
                values = read(row)[0]
                found.add(tuple(values[s] for s in sorted(values)))
        return found

    train, held_out = assignments(False), assignments(True)
    assert train and held_out and not train & held_out


def test_about_one_assignment_in_eight_is_held_out():
    config = chain.ChainConfig(symbols=4)
    every = [(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    assert 0.08 < sum(map(chain.is_held_out, every)) / len(every) < 0.17
    assert config.chance == 0.2


def test_answers_are_about_uniform_so_chance_is_one_in_modulus():
    counts = [0] * 5
    for row in rows(chain.ChainConfig(), 1000, held_out=True):
        counts[int(row["answer"])] += 1
    assert max(counts) < 260 and min(counts) > 145  # 200 each, 5 standard deviations


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(config):
    assert rows(config, 20) == rows(config, 20)
    assert rows(config, 20, seed=4) != rows(config, 20, seed=3)
    assert rows(config, 20, held_out=True) != rows(config, 20)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("<think>so 1 + 2 = 3.</think> 3", "3", True),
        (" 3", "3", True),
        ("3\n", "3", True),
        ("<think>so 1 + 2 = 3.</think> 4", "3", False),
        ("<think>so 1 + 2 = 3.</think>", "3", False),
        ("<think>so 1 + 2 = 3", "3", False),
        (" 3 3", "3", False),
        (" 13", "3", False),
        ("", "3", False),
        ("3", None, False),
    ],
)
def test_check(text, answer, right):
    assert chain.check(text, answer, {}) is right


def test_check_accepts_every_generated_reply(config):
    for row in rows(config, 50):
        assert chain.check(row["messages"][1]["content"], row["answer"], {})
        wrong = str((int(row["answer"]) + 1) % config.modulus)
        assert not chain.check(row["messages"][1]["content"], wrong, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"symbols": 1},
        {"symbols": 27},
        {"links": 6},
        {"links": 0},
        {"modulus": 1},
        {"middle_min": 5, "middle_max": 4},
        {"middle_min": -1},
        {"used_share": 1.5},
        {"used_share": -0.1},
    ],
)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(UserError, match="chain: "):
        chain.ChainConfig(**fields)


def test_problem_file_holds_the_rows_in_order_and_replaces_an_old_one_only_when_complete(tmp_path):
    config, path = chain.ChainConfig(), tmp_path / "new" / "train.jsonl"
    write_problems(path, lambda i: chain.record(config, 0, i, held_out=False), 7)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == rows(config, 7, seed=0)

    def fails_late(index):
        if index == 3:
            raise OSError("disk full")
        return {}

    with pytest.raises(OSError, match="disk full"):
        write_problems(path, fails_late, 7)
    assert [json.loads(line) for line in path.read_text().splitlines()] == written
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"]
