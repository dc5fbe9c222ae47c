"""The study's language can be counted: its figures are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import irl_study as study
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.tasks.student import StudentConfig, write_student


@pytest.fixture(scope="module")
def language():
    return study.Language(3)


def test_the_expert_prefers_planted_bigrams_of_its_prompt(language):
    words = study.WORDS.tolist()
    assert language.expert_PY.sum(1).tolist() == pytest.approx([1.0] * study.PROMPTS)
    ratio = language.expert_PY / language.expert_PY[:, :1]
    expected = (study.STRENGTH * (language.reward_PY - language.reward_PY[:, :1])).exp()
    torch.testing.assert_close(ratio, expected)
    for p in range(study.PROMPTS):
        pairs = {
            (a, b)
            for w, r in zip(words, language.reward_PY[p], strict=True)
            if r
            for a, b in zip(w, w[1:], strict=False)
        }
        assert len(pairs) >= 2
    p, better, worse = language.held_out.T
    assert len(p) > 500 and (language.reward_PY[p, better] > language.reward_PY[p, worse]).all()


def test_noise_replaces_its_share_of_demonstrations(language):
    clean, noisy = language.demonstrations(0.0), language.demonstrations(0.3)
    assert len(clean) == study.DEMONSTRATIONS and [p for p, _ in clean] == [p for p, _ in noisy]
    changed = sum(a != b for a, b in zip(clean, noisy, strict=True)) / len(clean)
    assert 0.25 < changed < 0.33


def test_figures_of_a_model_are_exact(language, tmp_path):
    words = [*(f"p{p}" for p in range(study.PROMPTS)), *(f" {c}" for c in "abcde"[: study.LETTERS])]
    write_student(tmp_path, words, StudentConfig(context=64))
    config = ModelConfig(path=str(tmp_path))
    lm, tokenizer = LanguageModel.load(config).eval(), load_tokenizer(config)
    ids = language.ids(tokenizer)
    assert tokenizer.decode(ids[1, 0]) == "<|user|>p1<|end|><|assistant|> a a a<|end|>"
    logp = language.logp(lm, ids)
    row = ids[2, 17]
    logits = lm.hf(input_ids=row[None]).logits[0].double().log_softmax(-1)
    start = len(row) - study.LENGTH - 1
    assert float(logp[2, 17]) == pytest.approx(
        sum(float(logits[k - 1, row[k]]) for k in range(start, len(row))), abs=1e-5
    )
    found = language.figures(lm, ids, language.reward_PY)
    assert found["held_out_accuracy"] == 1.0 and 0 < found["valid"] < 1
    assert found["kl"] == pytest.approx(float((language.expert_PY * (language.expert_PY.log() - logp)).sum(1).mean()))
    assert language.figures(lm, ids, -language.reward_PY)["held_out_accuracy"] == 0.0
