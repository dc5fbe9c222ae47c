"""The chain task against an independent solver that reads only the text."""

import json
import math
import re
from collections import Counter

import pytest

from lit_reason.errors import UserError
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems

CONFIGS = {
    "demo": chain.ChainConfig(),
    "two links": chain.ChainConfig(symbols=5, values=7, links=2, middle_min=5, middle_max=9),
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
    named, _, extras = asked.partition(" then ")
    names, operands = named.split()[::2], named.split()[1::2]
    assert names == ["first", "second", "third", "fourth"][: len(names)]
    values = {pair[0]: int(pair[1:]) for pair in given.split()}
    trace, solution = re.fullmatch(r"<think>(.*)</think> (\d+)", reply, re.DOTALL).groups()
    parts = {"decode": [], "so": [], "middle": []}
    for thought in trace.split("\n\n"):
        first = thought.split()[0]
        parts[first if first in parts else "middle"].append(thought)
    order = [t.split()[0] if t.split()[0] in ("decode", "so") else "middle" for t in trace.split("\n\n")]
    return values, operands, extras.split(), parts, order, solution


def test_the_answer_is_the_sum_of_what_the_prompt_says(config):
    for row in rows(config):
        values, operands, extras, _, _, solution = read(row)
        assert set(values) == set(config.letters)
        assert len(set(operands)) == config.links + 1
        total = sum(values[s] for s in operands + extras)
        assert row["answer"] == solution == str(total)


def test_understanding_then_exploration_then_convergence(config):
    for row in rows(config):
        _, _, _, parts, order, _ = read(row)
        assert order == ["decode"] * (config.links + 1) + ["middle"] * len(parts["middle"]) + ["so"] * config.links
        assert config.middle_min <= len(parts["middle"]) <= config.middle_max
        assert all(re.match(r"(wait|but|hmm|alternatively|meanwhile) ", t) for t in parts["middle"])


def test_every_equation_holds_and_every_value_is_the_given_one(config):
    for row in rows(config):
        values, _, _, parts, _, _ = read(row)
        for thought in parts["decode"] + parts["middle"]:
            for symbol, value in re.findall(r"\b([a-z]) (\d+)", thought):
                assert values[symbol] == int(value), thought
        for thought in parts["middle"] + parts["so"]:
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert numbers[0] + numbers[1] == numbers[2], thought


def test_the_tail_follows_from_the_head_and_the_used_middle(config):
    for row in rows(config):
        values, operands, extras, parts, _, solution = read(row)
        decoded = {t.split()[1]: (t.split()[2], int(t.split()[3].rstrip("."))) for t in parts["decode"]}
        assert [symbol for symbol, _ in decoded.values()] == operands
        total = decoded["first"][1]
        used = [t for t in parts["middle"] if t.startswith("meanwhile")]
        assert [t.split(" + ")[1].split()[0] for t in used] == extras
        for thought in used:
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert numbers[0] == total
            total = numbers[2]
        for thought, (name, (_, value)) in zip(parts["so"], list(decoded.items())[1:], strict=True):
            numbers = [int(n) for n in re.findall(r"\d+", thought)]
            assert numbers[:2] == [total, value] and f" + {name} {value} " in thought
            total = numbers[2]
        assert (used + parts["so"])[0].split()[1] == "first"
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
        assert cut.count("decode") == len(parts["decode"]) and cut.count("so") == len(parts["so"])


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
    every = [(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    assert 0.08 < sum(map(chain.is_held_out, every)) / len(every) < 0.17


def test_chance_is_the_share_of_the_most_common_answer():
    assert chain.ChainConfig().chance == 85 / 625  # ways to make 8 of four numbers from 0 to 4
    assert chain.ChainConfig(values=2, links=1).chance == 0.5
    assert chain.ChainConfig(values=6, links=1).chance == pytest.approx(1 / 6)  # 5 of two dice from 0 to 5


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_constant_answer_beats_chance(share):
    config = chain.ChainConfig(used_share=share)
    counts = Counter(row["answer"] for row in rows(config, 1000, held_out=True))
    assert counts.most_common(1)[0][1] < 1000 * config.chance + 5 * 11  # 5 standard deviations
    assert max(map(int, counts)) <= config.largest


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
        wrong = str(int(row["answer"]) + 1)
        assert not chain.check(row["messages"][1]["content"], wrong, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"symbols": 1},
        {"symbols": 27},
        {"links": 6},
        {"links": 0},
        {"values": 1},
        {"symbols": 12, "links": 8},
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
