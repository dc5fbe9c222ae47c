"""Plain text to packed rows: what is predicted, what is cut, what is refused."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.data.reading.records import Quarantine
from lit_reason.data.text.datamodule import TextData
from lit_reason.data.text.documents import held_out, read_documents, text_at
from lit_reason.data.text.text_rows import TextRows
from lit_reason.data.text.tokenizer_training import BORDER, train_tokenizer
from lit_reason.errors import RowError, UserError

TEXTS = [f"the {word} of number {i} says: naïve café, 12{i} times!\n" * (i + 1) for i, word in enumerate("abcdefgh")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 300)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_for(path, tokenizer, tmp_path, **settings):
    data = TextData(train_file=path, cache_dir=str(tmp_path / "cache"), **{"batch_tokens": 64, **settings})
    data.tokenizer = tokenizer
    return data


# ---- documents ----


def test_a_field_may_lie_in_lists_and_objects():
    row = {"messages": [{"content": "a"}, {"content": "b"}], "meta.text": "c"}
    assert text_at(row, "messages.-1.content") == "b"
    assert text_at(row, "meta.text") == "c"
    with pytest.raises(RowError, match="did you mean 'content'"):
        text_at(row, "messages.0.contents")
    with pytest.raises(RowError, match="is no text: it is list"):
        text_at(row, "messages")


def test_a_missing_field_stops_at_the_first_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"txt": "x"}] * 3)
    with pytest.raises(UserError, match=r"data.text_field is 'text': no field 'text'.*did you mean 'txt'.*a.jsonl:1"):
        list(read_documents([path], "text", Quarantine(None, 10)))


def test_a_later_row_without_text_is_set_aside_and_blank_documents_become_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"title": "y"}, {"text": " \n"}])
    rejects = Quarantine(None, 10)
    assert list(read_documents([path], "text", rejects)) == [("a.jsonl:1", "x"), ("a.jsonl:3", "")]
    assert rejects.total == 1


@pytest.mark.parametrize("opener, suffix", [(open, ""), (gzip.open, ".gz"), (lzma.open, ".xz")])
def test_a_plain_text_file_is_one_document(tmp_path, opener, suffix):
    for name in ("one", "two"):
        with opener(tmp_path / f"{name}.txt{suffix}", "wt") as file:
            file.write(f"{name} first\nline\n\nsecond\n")
    found = list(
        read_documents([str(tmp_path / f"{n}.txt{suffix}") for n in ("one", "two")], "text", Quarantine(None, 0))
    )
    assert [text for _, text in found] == ["one first\nline\n\nsecond", "two first\nline\n\nsecond"]


def test_a_long_plain_text_file_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_reason.data.text.documents.JOINED_CHARS", 10)
    (tmp_path / "a.txt").write_text("\n\n".join(["abcdefgh"] * 5))
    found = [text for _, text in read_documents([str(tmp_path / "a.txt")], "text", Quarantine(None, 0))]
    assert found == ["abcdefgh\n\nabcdefgh", "abcdefgh\n\nabcdefgh", "abcdefgh"]


def test_hub_data_sets_are_fetched_as_they_are_read(monkeypatch):
    datasets = pytest.importorskip("datasets")
    fetched = []

    def load(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("user/name", "en", "train", True)
        return ({"text": fetched.append(i) or f"document {i}"} for i in range(1000))

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = read_documents(["user/name/en"], "text", Quarantine(None, 0))
    assert next(stream) == ("en:1", "document 0") and len(fetched) <= 2


def test_a_broken_xz_file_is_refused(tmp_path, tokenizer):
    whole = lzma.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 50).encode())
    (tmp_path / "a.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    data = data_for(str(tmp_path / "a.jsonl.xz"), tokenizer, tmp_path)
    with pytest.raises(UserError, match="cannot read .*a.jsonl.xz"):
        data.setup("fit")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "half a store was left behind"


def test_the_holdout_is_near_its_share_and_keeps_equal_documents_together():
    drawn = [held_out(f"document {i}", 0.2, seed=1) for i in range(2000)]
    assert 340 < sum(drawn) < 460
    assert drawn == [held_out(f"document {i}", 0.2, seed=1) for i in range(2000)]
    assert drawn != [held_out(f"document {i}", 0.2, seed=2) for i in range(2000)]
    assert not any(held_out(f"document {i}", 0.0, seed=1) for i in range(100))


# ---- tokenizer ----


def test_the_tokenizer_writes_every_text_and_reads_it_back(tokenizer):
    assert len(tokenizer) == 300
    for text in [*TEXTS, "日本語 \t\r\n x  y", "😀 ½"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_equal_texts_train_equal_tokenizers(tokenizer):
    assert train_tokenizer(iter(TEXTS), 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_only_the_beginning_of_the_text_trains_the_tokenizer(monkeypatch):
    monkeypatch.setattr("lit_reason.data.text.tokenizer_training.TRAINED_ON_CHARS", 5)
    taken = []
    train_tokenizer((taken.append(t) or t for t in ["abc", "def", "ghi", "jkl"]), 260)
    assert len(taken) < 4


def test_too_small_a_vocabulary_and_no_text_are_refused():
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(iter(TEXTS), 256)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(iter(["", ""]), 300)


# ---- rows ----


def predicted(rows):
    return np.concatenate([row.ids[1:] for row in rows]).tolist()


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=5), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_every_token_is_predicted_once_and_every_byte_counted(texts, max_length):
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    rows = list(TextRows(tokenizer, max_length, "pack")((f"d{i}", t) for i, t in enumerate(texts)))
    end = tokenizer.eos_token_id
    wanted = [tokenizer(t, add_special_tokens=False).input_ids for t in texts if t]
    assert predicted(rows) == [i for ids in wanted for i in [*ids, end]] if rows else not any(texts)
    assert all(2 <= len(row.ids) <= max_length for row in rows)
    assert sum(row.text_bytes for row in rows) == sum(len(t.encode()) for t in texts)


def test_a_continued_row_begins_with_the_last_token_before_it(tokenizer):
    rows = list(TextRows(tokenizer, 10, "pack")([("d", TEXTS[3])]))
    assert len(rows) > 2
    for before, after in zip(rows, rows[1:], strict=False):
        assert after.ids[0] == before.ids[-1]
    assert [row.name for row in rows[:3]] == ["d", "d#1", "d#2"]


def test_truncation_keeps_the_first_row_and_counts_the_rest(tokenizer):
    encode = TextRows(tokenizer, 10, "truncate")
    rows = list(encode([("d", TEXTS[3]), ("e", "a")]))
    ids = [tokenizer.bos_token_id, *tokenizer(TEXTS[3], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert rows[0].ids.tolist() == ids[:10] and encode.cut_tokens == len(ids) - 10
    assert len(rows) == 2 and rows[1].ids.tolist()[-1] == tokenizer.eos_token_id
    assert rows[0].text_bytes == len(tokenizer.decode(ids[1:10]).encode())


def test_special_tokens_in_the_text_are_text(tokenizer):
    (row,) = TextRows(tokenizer, 99, "pack")([("d", f"a{BORDER}b")])
    assert row.ids.tolist().count(tokenizer.eos_token_id) == 2  # the two borders of the document
    assert tokenizer.decode(row.ids[1:-1]) == f"a{BORDER}b"


@pytest.mark.parametrize("vocabulary, kind", [(300, "uint16"), (70_000, "int32")])
def test_what_is_stored_comes_back(tmp_path, tokenizer, vocabulary, kind):
    from lit_reason.data.text.text_store import TextStore, write_text_store

    rows = list(TextRows(tokenizer, 10, "pack")([("é", TEXTS[2]), ("f", TEXTS[1])]))
    write_text_store(tmp_path, iter(rows), vocabulary, lambda: {"rows": len(rows)})
    store = TextStore(tmp_path)
    assert store.meta["dtype"] == kind and len(store) == len(rows)
    for i, row in enumerate(rows):
        back = store.row(i)
        assert back.ids.tolist() == row.ids.tolist() and back.row_id == row.name
        assert back.text_bytes == row.text_bytes
        assert back.weight.tolist() == [0, *[1] * (len(row.ids) - 1)]
        assert store.lengths[i] == len(row.ids) and store.weight_sums[i] == back.weight.sum()
        assert store.trained_counts[i] == (back.weight > 0).sum()


# ---- data module ----


def test_a_pack_predicts_every_token_but_the_first_of_each_row(tmp_path, tokenizer):
    data = data_for(write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), tokenizer, tmp_path, max_length=32)
    data.setup("fit")
    packs = list(data.train_dataloader())
    assert sum(len(p.targets) for p in packs) == sum(
        len(tokenizer(t, add_special_tokens=False).input_ids) + 1 for t in TEXTS
    )
    assert sum(p.text_bytes for p in packs) == sum(len(t.encode()) for t in TEXTS)
    assert all(len(p.ids) <= 64 for p in packs)


def test_the_order_goes_on_after_the_last_pack_handed_out(tmp_path, tokenizer):
    data = data_for(write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), tokenizer, tmp_path, max_length=16)
    data.setup("fit")
    loader = data.train_dataloader()
    seen = []
    for pack in loader:
        seen.append(pack.row_ids)
        if len(seen) == 3:
            state = loader.state_dict()
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert [pack.row_ids for pack in resumed] == seen[3:] and len(seen) > 5


def test_held_out_documents_are_in_one_split_and_not_in_the_tokenizer(tmp_path, tokenizer):
    texts = [f"word{i} " * 8 for i in range(40)]
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    data = data_for(path, tokenizer, tmp_path, holdout=0.3)
    data.setup("fit")
    names = {s: {data.stores[s].row(i).row_id for i in range(len(data.stores[s]))} for s in ("train", "val")}
    assert names["train"].isdisjoint(names["val"]) and len(names["train"] | names["val"]) == 40
    data.vocab_size = 2000
    vocabulary = data.trained_tokenizer().get_vocab()
    # 'word' is one piece; the numbers stand alone, so a two-digit number of a held-out document is never merged
    numbers = {i for i in range(10, 40) if str(i) in vocabulary}
    assert numbers == {i for i in range(10, 40) if f"a.jsonl:{i + 1}" in names["train"]}


def test_a_token_budget_ends_reading_and_sets_the_steps(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 20])
    data = data_for(path, tokenizer, tmp_path, max_length=32, token_budget=1000)
    data.setup("fit")
    trained = int(data.stores["train"].weight_sums.sum())
    assert 1000 <= trained < 1031
    assert data.steps() == len(data.train_dataloader())
    data = data_for(path, tokenizer, tmp_path, max_length=32, token_budget=100_000)
    data.setup("fit")
    passes = 100_000 / data.stores["train"].weight_sums.sum()
    assert passes > 2 and data.steps() == round(passes * len(data.train_dataloader()))


def test_a_corpus_below_one_batch_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "abc"}] * 3)
    with pytest.raises(UserError, match="3 rows of .* tokens, less than one optimizer step of 1 x 4,096 tokens"):
        data_for(path, tokenizer, tmp_path, batch_tokens=4096).setup("fit")
    with pytest.raises(UserError, match="1 x 4 rows: give more text, or lower data.batch_rows"):
        data_for(path, tokenizer, tmp_path, batch_rows=4).setup("fit")
    data_for(path, tokenizer, tmp_path, batch_rows=3).setup("fit")


def test_empty_documents_are_counted_and_nothing_but_empty_ones_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": ""}, *({"text": t} for t in TEXTS)])
    data = data_for(path, tokenizer, tmp_path, max_length=64)
    data.setup("fit")
    assert data.ledger["notes"] == ["1 empty documents were passed over"] and data.ledger["documents"] == 9
    path = write(tmp_path / "b.jsonl", [{"text": " "}] * 2)
    with pytest.raises(UserError, match="no train text is left .*2 documents, 2 of them empty"):
        data_for(path, tokenizer, tmp_path).setup("fit")


def test_another_tokenizer_or_length_is_another_store(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    folders = set()
    for made, length in ((tokenizer, 32), (tokenizer, 16), (train_tokenizer(iter(TEXTS), 290), 32), (tokenizer, 32)):
        data = data_for(path, made, tmp_path, max_length=length)
        data.setup("fit")
        folders.add(data.stores["train"].folder)
    assert len(folders) == 3


def test_wrong_settings_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="data.holdout is 1.5"):
        TextData(holdout=1.5)
    for stage, said in (
        ("fit", "data.train_file is missing"),
        ("test", "data.test_file"),
        ("validate", "data.val_file"),
    ):
        with pytest.raises(UserError, match=said):
            TextData(cache_dir=str(tmp_path)).setup(stage)
    with pytest.raises(UserError, match="needs 2 tokens"):
        TextRows(tokenizer, 1, "pack")


def test_padding_would_not_change_the_loss(tmp_path, tokenizer):
    """The literature pads truncated documents and masks the padding: the same loss as our packed rows."""
    from models.tiny_models import tiny

    lm = tiny(changes={"vocab_size": 300})
    data = data_for(write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS[:4]]), tokenizer, tmp_path)
    data.max_length, data.layout, data.batch_rows = 12, "truncate", 4
    data.setup("fit")
    (pack,) = data.train_dataloader()
    ours = lm(pack.ids, pack.positions, pack.cu_seqlens, pack.index, pack.targets, pack.target_weight).loss_sum
    rows = [data.stores["train"].row(i).ids for i in range(4)]
    ids = torch.full((4, 12), 0)
    labels = torch.full((4, 12), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row).long()
    mean = lm.hf(input_ids=ids, labels=labels, attention_mask=(labels >= 0).long()).loss
    torch.testing.assert_close(ours / pack.norm, mean, rtol=1e-5, atol=1e-5)
