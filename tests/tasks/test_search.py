"""The search task against an independent solver that reads only the text."""

import re
from itertools import combinations

import pytest

from lit_reason.errors import UserError
from lit_reason.tasks import search

CONFIGS = {
    "default": search.SearchConfig(),
    "small": search.SearchConfig(symbols=4, values=7, misses_min=0, shuffle=False),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def rows(config, n=200, seed=3, held_out=False):
    return [search.record(config, seed, i, held_out=held_out) for i in range(n)]


def read(row):
    question, reply = (message["content"] for message in row["messages"])
    given, target = re.fullmatch(r"given (.*) target(\d+)", question).groups()
    values = {pair[0]: int(pair[1:]) for pair in given.split()}
    trace, solution = re.fullmatch(r"<think>(.*)</think> (\w \w)", reply, re.DOTALL).groups()
    return values, int(target), trace.split("\n\n"), solution


def test_the_answer_is_the_only_pair_with_the_wanted_sum(config):
    for row in rows(config):
        values, target, _, solution = read(row)
        right = [f"{a} {b}" for a, b in combinations(values, 2) if values[a] + values[b] == target]
        assert right == [solution] == [row["answer"]]


def test_the_trace_decodes_all_then_tries_pairs_in_order_up_to_the_hit(config):
    for row in rows(config):
        values, target, thoughts, solution = read(row)
        n = len(values)
        assert config.shuffle or list(values) == sorted(values)
        assert thoughts[:n] == [f"is {s} {v}." for s, v in values.items()]
        pairs = list(combinations(values, 2))
        hit = pairs.index(tuple(solution.split()))
        assert hit >= config.misses_min
        assert len(thoughts) == n + hit + 2
        for thought, (a, b) in zip(thoughts[n : n + hit], pairs, strict=False):
            total = values[a] + values[b]
            assert re.sub(r"^(wait|but|hmm|alternatively) ", "", thought) == (
                f"{a} {values[a]} + {b} {values[b]} = {total} want {target} no."
            )
            assert total != target
        a, b = solution.split()
        assert re.sub(r"^\w+ ", "", thoughts[-2]) == f"{a} {values[a]} + {b} {values[b]} = {target} want {target} yes."
        assert thoughts[-1] == f"so {a} {b}."


def test_every_late_enough_pair_is_a_hit_about_equally_often():
    config = search.SearchConfig()
    counts = [0] * 15
    for row in rows(config, 1100):
        values, _, _, solution = read(row)
        counts[list(combinations(values, 2)).index(tuple(solution.split()))] += 1
    assert counts[:4] == [0] * 4
    assert min(counts[4:]) > 55 and max(counts[4:]) < 155  # 100 each, 5 standard deviations
    assert config.chance == 1 / 11


def test_held_out_assignments_are_never_trained_on_whatever_the_seed(config):
    def assignments(held_out):
        found = set()
        for seed in (0, 1):
            for row in rows(config, 200, seed, held_out):
                values = read(row)[0]
                found.add(tuple(values[s] for s in sorted(values)))
        return found

    train, held_out = assignments(False), assignments(True)
    assert train and held_out and not train & held_out


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(config):
    assert rows(config, 20) == rows(config, 20)
    assert rows(config, 20, seed=4) != rows(config, 20, seed=3)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("<think>so b d.</think> b d", "b d", True),
        (" d b", "b d", True),
        ("<think>so b d.</think> b c", "b d", False),
        ("<think>so b d.</think>", "b d", False),
        (" b", "b d", False),
        (" b d d", "b d", False),
        ("b d", None, False),
    ],
)
def test_check(text, answer, right):
    assert search.check(text, answer, {}) is right


@pytest.mark.parametrize("fields", [{"symbols": 1}, {"values": 1}, {"misses_min": 15}, {"misses_min": -1}])
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(UserError, match="search: "):
        search.SearchConfig(**fields)


def test_symbols_are_shown_in_random_order_unless_told_otherwise():
    orders = {tuple(read(row)[0]) for row in rows(search.SearchConfig(), 50)}
    assert len(orders) > 40
