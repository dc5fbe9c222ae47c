"""Labelled texts: what is read, what is refused, and that no text serves two purposes."""

from __future__ import annotations

import json

import pytest
import torch

from lit_reason.data.labelled.datamodule import LabelledData
from lit_reason.data.labelled.texts import part_of, read_history, split_history
from lit_reason.data.reading.records import Quarantine
from lit_reason.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def history(path, rows, text="text", label="label", pair=None):
    with Quarantine(None, 100) as rejects:
        return read_history([write(path, rows)], text, label, pair, rejects), rejects


class Words:
    """A tokenizer that numbers words by their length."""

    eos_token_id = 0

    def __call__(self, text):
        class Encoding:
            input_ids = [len(word) for word in text.split()]

        return Encoding

    def apply_chat_template(self, turns, **_):
        return {"input_ids": [99, *self(turns[0]["content"]).input_ids, 98]}


def test_texts_labels_and_pairs_are_read_wherever_they_are(tmp_path):
    rows = [{"messages": [{"content": "so it is"}], "meta": {"kind": 1, "pair": "p"}}]
    rows += [{"messages": [{"content": "no"}], "meta": {"kind": "x", "pair": 7}}]
    found, _ = history(tmp_path / "h.jsonl", rows, "messages.0.content", "meta.kind", "meta.pair")
    assert [(t.number, t.text, t.label, t.pair) for t in found] == [(0, "so it is", "1", "p"), (1, "no", "x", "7")]


def test_rows_without_text_or_label_are_counted(tmp_path):
    rows = [
        {"text": "a", "label": "x"},
        {"text": " ", "label": "x"},
        {"text": "b", "label": None},
        {"text": "c", "label": "y"},
    ]
    found, rejects = history(tmp_path / "h.jsonl", rows)
    assert [t.text for t in found] == ["a", "c"] and [t.number for t in found] == [0, 1]
    assert rejects.total == 2 and any(
        "is no label: it is None" in line or "field 'label' is no text" in line for line in rejects._first
    )


def test_one_class_only_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"texts of two labels at least \(data.label_field is 'label'\): all 3 have the label 'x'"
    ):
        history(tmp_path / "h.jsonl", [{"text": t, "label": "x"} for t in "abc"])
    with pytest.raises(UserError, match=r"(?s)none could be used.*no field 'labl'.*did you mean 'label'"):
        history(tmp_path / "h.jsonl", [{"text": "a", "label": "x"}], label="labl")


def test_parts_share_no_text_and_keep_equal_texts_together(tmp_path):
    rows = [{"text": f"text {i % 60}", "label": "xy"[i % 2]} for i in range(120)]
    found, _ = history(tmp_path / "h.jsonl", rows)
    parts = split_history(found, 0.2, 0.3, 0)
    texts = {name: {t.text for t in part} for name, part in parts.items()}
    assert not (texts["train"] & texts["val"] or texts["train"] & texts["judge"] or texts["val"] & texts["judge"])
    assert sum(map(len, parts.values())) == 120 and 40 <= len(parts["train"]) <= 80
    assert split_history(found, 0.2, 0.3, 0) == parts != split_history(found, 0.2, 0.3, 1)
    assert part_of("text 1", 0.0, 0.0, 0) == "train"
    with pytest.raises(UserError, match=r"data.judge_share: no text of class 'z' is left for the part 'judge'"):
        split_history([*found, found[0].__class__(999, "r", part_text("train"), "z")], 0.0, 0.3, 0)


def part_text(part):
    return next(t for t in map(str, range(1000)) if part_of(t, 0.0, 0.3, 0) == part)


def loaded(tmp_path, **settings):
    rows = [{"text": " ".join(["ab"] * (2 + i)), "label": "xy"[i % 2]} for i in range(10)]
    data = LabelledData(write(tmp_path / "h.jsonl", rows), holdout=0.0, judge_share=0.0, batch_rows=4, **settings)
    data.tokenizer = Words()
    data.setup("fit")
    return data


def test_a_pack_says_whose_texts_it_holds(tmp_path):
    data = loaded(tmp_path, max_length=8)
    batches = list(data.train_dataloader())
    assert sorted(n for b in batches for n in b.numbers.tolist()) == list(range(10))
    for batch in batches:
        assert batch.labels.tolist() == [n % 2 for n in batch.numbers.tolist()]
        assert batch.pack.lengths == tuple(min(2 + n, 8) for n in batch.numbers.tolist())
        assert batch.pack.index.numel() == sum(n - 1 for n in batch.pack.lengths)


def test_texts_that_are_cut_are_counted(tmp_path, caplog):
    with caplog.at_level("INFO"):
        list(loaded(tmp_path, max_length=8).train_dataloader())  # texts of 2 to 11 words
        list(loaded(tmp_path, max_length=11).train_dataloader())
    assert [m for m in caplog.messages if "max_length" in m] == ["data.max_length 8 cuts 3 of 10 texts of train"]


def test_a_process_without_texts_counts_none(tmp_path):
    data = loaded(tmp_path)
    loader = data.train_dataloader()
    loader.sampler.rank, loader.sampler.world = 3, 4  # three bins for four processes
    (batch,) = list(loader)
    assert batch.labels.tolist() == [-1] and batch.pack.index.numel() == 0


def test_the_order_follows_the_run_s_seed_and_the_split_does_not(tmp_path):
    data = loaded(tmp_path)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append([n for b in data.train_dataloader() for n in b.numbers.tolist()])
    assert orders[0] == orders[1] != orders[2]


def test_prompts_come_from_a_file_a_list_or_are_neutral(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "tell me", "mix": {"a": 1}, "other": 2}])
    (prompt,) = loaded(tmp_path, prompts=file).eval_prompts()
    assert (prompt.text, prompt.ids, prompt.metadata) == ("tell me", [4, 2], {"mix": {"a": 1}, "other": 2})
    assert [p.ids for p in loaded(tmp_path, prompts=["a bc"], chat=True).eval_prompts()] == [[99, 1, 2, 98]]
    assert len(loaded(tmp_path).eval_prompts()) == 8
    wrong = write(tmp_path / "p.jsonl", [{"promt": "x"}])
    with pytest.raises(UserError, match=r"data.prompts: p.jsonl:1: no field 'prompt'.*did you mean 'promt'"):
        loaded(tmp_path, prompts=wrong).eval_prompts()


@pytest.mark.parametrize("wrong", [{"holdout": 0.5, "judge_share": 0.5}, {"batch_rows": 0}, {"max_length": 1}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"data.{next(iter(wrong))}"):
        LabelledData("x", **wrong)


def test_no_history_is_said():
    data = LabelledData()
    data.tokenizer = Words()
    with pytest.raises(UserError, match="data.history is missing"):
        data.setup("fit")
