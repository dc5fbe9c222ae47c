"""Held-out pairs of a reward: reading them kind by kind, and their accuracies."""

from __future__ import annotations

import json

import pytest
import torch

from lit_reason.data.config import RenderConfig
from lit_reason.data.rendering.render import Renderer
from lit_reason.errors import UserError
from lit_reason.metrics.intervals import wilson
from lit_reason.models.config import ModelConfig
from lit_reason.models.loading import load_tokenizer
from lit_reason.regimes.irl.held_out import PairMeter, by_kind, read_pairs
from lit_reason.tasks.student import write_student

LIMITS = {"max_length": 12, "limit": 3, "max_bad_rows": 10}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    folder = tmp_path_factory.mktemp("held-out")
    write_student(folder, [" a", " b", " c"])
    return Renderer(load_tokenizer(ModelConfig(path=str(folder))), RenderConfig())


def pairs_file(path, answers: list[tuple[str, str]]) -> str:
    rows = [{"prompt": " a", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_kinds_take_turns_up_to_their_limit_and_what_is_too_long_is_left_out(tmp_path, renderer):
    long = pairs_file(tmp_path / "long.jsonl", [(" a b c" * 5, " b"), *[(" a b", " b")] * 5])
    short = pairs_file(tmp_path / "short.jsonl", [(" a", " b")])
    found = read_pairs({"long": long, "short": short}, renderer, **LIMITS)
    assert [pair.kind for pair in found] == ["long", "short", "long", "long"]
    assert {len(pair.chosen) - len(pair.rejected) for pair in found if pair.kind == "long"} == {1}
    assert [pair.kind for pair in read_pairs(by_kind(short), renderer, **LIMITS)] == [""] and by_kind(None) == {}


def test_a_kind_without_pairs_is_refused_by_name(tmp_path, renderer):
    good, bad = (pairs_file(tmp_path / f"{n}.jsonl", [(" a" * n, " b")]) for n in (1, 30))
    with pytest.raises(UserError, match=r"pairs_file\.bad holds no pair.*(\n.*)*too long"):
        read_pairs({"good": good, "bad": bad}, renderer, **LIMITS)


def test_accuracies_are_counted_over_all_and_by_kind_each_with_its_interval(tmp_path, renderer):
    longer = pairs_file(tmp_path / "longer.jsonl", [(" a b", " b")] * 3)
    equal = pairs_file(tmp_path / "equal.jsonl", [(" a", " b")] * 3)
    pairs = read_pairs({"longer": longer, "equal": equal}, renderer, **LIMITS)
    meter = PairMeter(("longer", "equal"))
    margin = torch.tensor([1.0, -1.0, 2.0, -1.0, -3.0, 0.0])  # longer: right, right, wrong; equal: wrong, wrong, tie
    meter.add(pairs[:4], margin[:4])
    meter.add(pairs[4:], margin[4:])
    found = {name: float(value) for name, value in meter.compute().items()}
    expected = {"": (2.5 / 6, 4.5 / 6), "/longer": (2 / 3, 1.0), "/equal": (0.5 / 3, 0.5)}
    for ending, (right, by_length) in expected.items():
        assert found["pair_accuracy" + ending] == pytest.approx(right)
        assert found["length_accuracy" + ending] == pytest.approx(by_length)
        count = 3 if ending else 6
        ends = found["pair_accuracy_low" + ending], found["pair_accuracy_high" + ending]
        assert ends == pytest.approx(wilson(right * count, count))
    assert len(found) == 12
    meter.reset()
    meter.add(pairs[:1], margin[:1])
    assert float(meter.compute()["pair_accuracy"]) == 1.0 and "pair_accuracy/equal" not in meter.compute()
