"""MMLU through lm-eval: what is asked of it, and lm-eval itself on questions in MMLU's form."""

import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.errors import UserError
from lit_reason.metrics.mmlu import mmlu_accuracy

LETTERS = "ABCD"


def test_it_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lit-reason\[mmlu\]"):
        mmlu_accuracy(None, None)


def test_lm_eval_is_asked_for_all_subjects(monkeypatch):
    """lm-eval and its questions are stood in for; its own names are those of version 0.4.13."""
    asked: dict = {}

    def simple_evaluate(**settings):
        asked.update(settings)
        return {"results": {"mmlu": {"acc,none": 0.371}}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **settings: settings
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert mmlu_accuracy("model", "tokenizer", limit=2) == 0.371
    assert asked["tasks"] == ["mmlu"] and asked["limit"] == 2 and asked["num_fewshot"] == 0
    assert asked["model"] == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 8}


@pytest.mark.slow
def test_lm_eval_itself_finds_the_accuracy_of_the_likeliest_letters(tmp_path, monkeypatch):
    """All 57 subjects as lm-eval defines them, of different sizes, with made-up questions where it looks for MMLU."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra mmlu is not installed")
    datasets = pytest.importorskip("datasets")

    subjects = subjects_of(Path(lm_eval.__file__).parent / "tasks/mmlu/default")
    questions = write_questions(tmp_path / "cais/mmlu", list(subjects))
    monkeypatch.chdir(tmp_path)  # a local folder goes before the hub's data set of that name
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokenizer = random_model(q["question"] for rows in questions.values() for q in rows)
    hits = [
        likeliest_letter(model, tokenizer, subjects[subject], row) == row["answer"]
        for subject, rows in questions.items()
        for row in rows
    ]
    assert len(subjects) == 57 and 0 < sum(hits) < len(hits)
    assert mmlu_accuracy(model, tokenizer) == pytest.approx(sum(hits) / len(hits), abs=1e-9)


def subjects_of(folder: Path) -> dict[str, str]:
    """What lm-eval says before the questions of each of its subjects."""
    found = {}
    for path in sorted(folder.glob("mmlu_*.yaml")):
        name = re.search(r'"dataset_name": "(\w+)"', path.read_text())[1]
        found[name] = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
    return found


def write_questions(folder: Path, subjects: list[str]) -> dict[str, list[dict]]:
    """Sums as a data set in the form of MMLU's: a configuration for each subject, splits `test` and `dev`."""
    rng, found = random.Random(0), {}
    folder.mkdir(parents=True)
    for k, subject in enumerate(subjects):
        found[subject] = [question(rng) for _ in range(1 + k % 3)]
        for split, rows in (("test", found[subject]), ("dev", [question(rng)])):
            (folder / f"{subject}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [
        f"- config_name: {s}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {s}-{split}.jsonl\n" for split in ("test", "dev"))
        for s in subjects
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    return found


def question(rng: random.Random) -> dict:
    a, b, right = rng.randrange(9), rng.randrange(9), rng.randrange(4)
    choices = [str(a + b + k - right) for k in range(4)]
    return {"question": f"What is {a} plus {b}?", "choices": choices, "answer": right}


def random_model(texts):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, 300)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval(), tokenizer


@torch.no_grad()
def likeliest_letter(model, tokenizer, before: str, row: dict) -> int:
    """From the definition: the likeliest letter behind the question, its choices and `Answer:`."""
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    prompt = f"{before}{row['question']}\n{listed}Answer:"
    start = len(tokenizer(prompt).input_ids)
    scores = []
    for letter in LETTERS:
        ids = torch.tensor([tokenizer(f"{prompt} {letter}").input_ids])
        logp = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        scores.append(float(logp.gather(-1, ids[0, start:, None]).sum()))
    return scores.index(max(scores))
