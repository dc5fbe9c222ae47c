"""Keeping the thoughts that a student needs: which ones, and by which loss."""

import pytest
import torch

from benchmarks.useful_thoughts import condensed, selection, target_loss, token_losses
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = write_student(tmp_path_factory.mktemp("m") / "base", chain.words(chain.ChainConfig()))
    config = ModelConfig(path=str(folder))
    return LanguageModel.load(config).eval(), load_tokenizer(config)


def test_the_thoughts_with_the_largest_rise_stay_and_of_equal_ones_those_near_an_edge():
    assert selection([0.1, 2.0, -1.0, 3.0, 0.2], 0.4) == [1, 3]
    assert selection([0.0] * 5, 0.6) == [0, 1, 4]
    assert selection([1.0, 0.0, 0.0], 0.1) == [0]


def test_the_loss_of_a_target_is_that_of_its_tokens(student):
    lm, _ = student
    rows = [[3, 9, 12, 20, 7], [4, 8, 15]]
    with torch.inference_mode():
        found = target_loss(lm, rows, [3, 1])
        for row, start, loss in zip(rows, [3, 1], found, strict=True):
            logp = lm.hf(torch.tensor([row])).logits[0].log_softmax(-1)
            expected = [-float(logp[t - 1, row[t]]) for t in range(1, len(row))]
            assert token_losses(lm, row)[1:] == pytest.approx(expected, abs=1e-4)
            assert loss == pytest.approx(sum(expected[start - 1 :]), abs=1e-3)


@pytest.mark.parametrize("target", ["solution", "rest"])
def test_half_of_the_thoughts_stay_in_order(student, target):
    record = chain.record(chain.ChainConfig(), 0, 0, held_out=False)
    with torch.inference_mode():
        made = condensed(*student, record, 0.5, target)
    before, after = (r["messages"][1]["content"][len("<think>") :].split("</think>") for r in (record, made))
    whole, kept = before[0].split("\n\n"), after[0].split("\n\n")
    assert before[1] == after[1] and len(kept) == -(-len(whole) // 2)
    places = iter(whole)
    assert all(thought in places for thought in kept)
