"""Rows of LUME, TOFU and MUSE as they are read, rendered and asked for; questions of the utility set."""

import json
from pathlib import Path

import numpy as np
import pytest
from rigged_model import word_tokenizer

from lit_reason.data.rendering.stop_tokens import known_stop_ids
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.data.token_row import Segment
from lit_reason.data.unlearning.choices import common_questions, read_questions
from lit_reason.data.unlearning.datamodule import UnlearnData, packs_of
from lit_reason.data.unlearning.refusals import REFUSALS, refusal_for
from lit_reason.data.unlearning.rows import Role, document_of, read_rows
from lit_reason.errors import UserError


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kinds(path: str) -> list[tuple[str, str, str, str]]:
    return [(r.group, r.prompt, r.answer, r.row_id) for r in read_rows(path, Role.FORGET, "data.forget")]


def test_rows_of_lume(tmp_path):
    path = write(
        tmp_path / "lume.jsonl",
        [
            {"id": '"8f24-ab"sc1', "input": "It began", "output": "and ended.", "task": "Task1"},
            {"id": "df8d-04qa12", "input": "When?", "output": "1971", "task": "Task2"},
        ],
    )
    assert kinds(path) == [
        ("forget_task1_regurgitation", "It began", "and ended.", '"8f24-ab"sc1'),
        ("forget_task2_knowledge", "When?", "1971", "df8d-04qa12"),
    ]


def test_rows_of_tofu_and_muse(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        [
            {"question": "Who wrote it?", "answer": "Nobody did."},
            {"prompt": "Once upon", "gt": " a time"},
            {"text": "A whole chapter."},
        ],
    )
    assert kinds(path) == [
        ("forget_rows_knowledge", "Who wrote it?", "Nobody did.", "forget mixed.jsonl:1"),
        ("forget_rows_regurgitation", "Once upon", " a time", "forget mixed.jsonl:2"),
        ("forget_rows_document", "", "A whole chapter.", "forget mixed.jsonl:3"),
    ]


def data(tmp_path: Path, tokenizer, forget: list[dict], retain: list[dict], **settings) -> UnlearnData:
    files = {"forget": write(tmp_path / "f.jsonl", forget), "retain": write(tmp_path / "r.jsonl", retain)}
    module = UnlearnData(**files, **{"utility": None, **settings})
    module.tokenizer = tokenizer
    module.setup("fit")
    return module


def qa(name: str, question: str, answer: str) -> dict:
    return {"id": f"{name}qa0", "input": question, "output": answer, "task": "Task2"}


def test_training_begins_with_what_generation_is_prompted_with(tmp_path):
    """Also where the joined text has other tokens at the seam: prompt `ab` and answer `c` make one word `abc`."""
    tokenizer = train_tokenizer(iter(["abc abc abc abc ab c"] * 50), 262)
    assert len(tokenizer("abc", add_special_tokens=False).input_ids) < 2
    module = data(tmp_path, tokenizer, [qa("x", "ab", "c")], [qa("y", "c ", "ab")])
    for row, prompt in zip(module.store.rows, module.prompts(), strict=True):
        trained = int(np.flatnonzero(row.weight)[0])
        assert row.ids[:trained].tolist() == prompt.ids
        assert tokenizer.decode(row.ids[trained:-1]) == prompt.answer
        assert row.ids[-1] in known_stop_ids(tokenizer) and row.segment[-1] == Segment.END and row.weight[-1] == 1


def test_a_long_document_becomes_rows_that_continue_each_other(tmp_path):
    words = "a b c d e f g h " * 5
    module = data(tmp_path, word_tokenizer(), [{"text": words.strip()}], [qa("y", "a", "b")], max_length=16)
    store = module.store
    parts = [store.rows[i] for i in store.numbers(Role.FORGET)]
    assert [len(p) for p in parts] == [16, 16, 11] and all(p.weight[0] == 0 for p in parts)
    trained = np.concatenate([p.ids[p.weight > 0] for p in parts])
    assert len(trained) == 40 and parts[1].ids[0] == parts[0].ids[-1]  # 41 tokens, of which the first has no context
    assert module.groups == ["retain_task2_knowledge"] and len(module.prompts()) == 1


def test_documents_of_the_attack_have_no_end_token_and_are_cut(tmp_path):
    documents = {"members": "a b c d e f", "nonmembers": "a b c d e g"}  # the ids of one file may be those of the other
    files = {
        name: write(tmp_path / f"{name}.jsonl", [{"id": f"m{i}", "document": f"{text} {i}"} for i in range(2)])
        for name, text in documents.items()
    }
    module = data(tmp_path, word_tokenizer(), [qa("x", "a", "b")], [qa("y", "a", "c")], max_length=4, **files)
    rows = [module.store.rows[i] for i in module.store.numbers(Role.MEMBER, Role.NONMEMBER)]
    assert len(rows) == 4 and all(len(row) == 4 and row.segment[-1] == Segment.TEXT for row in rows)


def test_documents_of_the_attack_on_both_sides_are_refused_and_unlike_lengths_said(tmp_path):
    long, short = ({"document": text} for text in ("a b c d e f", "a b"))
    sides = {"members": [long], "nonmembers": [short, {"id": "twin", "text": " a b c d e f"}]}
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in sides.items()}
    with pytest.raises(UserError, match="overlap: twin: no document") as refused:
        data(tmp_path, word_tokenizer(), [qa("x", "a", "b")], [qa("y", "a", "c")], **files)
    assert "a b" not in str(refused.value)
    write(tmp_path / "nonmembers.jsonl", [short])
    with pytest.warns(UserWarning, match="members have 6 tokens on the mean and data.nonmembers 2"):
        data(tmp_path, word_tokenizer(), [qa("x", "a", "b")], [qa("y", "a", "c")], **files)


def test_rows_without_ids_in_files_of_one_name_are_told_apart(tmp_path):
    """As TOFU has them: no ids, and the two sets in folders of their own."""
    paths = []
    for side, answer in (("forget10", "Ann"), ("retain90", "Ben")):
        (tmp_path / side).mkdir()
        paths.append(write(tmp_path / side / "train.jsonl", [{"question": "Who?", "answer": answer}]))
    module = UnlearnData(*paths, utility=None)
    module.tokenizer = word_tokenizer()
    module.setup("fit")
    assert [(p.row_id, p.answer) for p in module.prompts()] == [
        ("forget train.jsonl:1", "Ann"),
        ("retain train.jsonl:1", "Ben"),
    ]


def test_rows_of_one_document_share_its_name():
    names = {'"8f24-ab"sc1': '"8f24-ab"', "df8dqa12": "df8d", "book.txt:3#7": "book.txt:3", "author7": "author7"}
    assert {name: document_of(name) for name in names} == names


def test_whole_texts_are_trained_where_asked_and_answers_scored(tmp_path):
    forget, retain = [qa("x", "a b", "c")], [qa("y", "a", "d")]
    answers = data(tmp_path, word_tokenizer(), forget, retain)
    whole = data(tmp_path, word_tokenizer(), forget, retain, train_on="text")
    trained = [[row.weight.tolist() for row in m.train_dataloader().dataset.rows] for m in (answers, whole)]
    assert trained == [[[0, 0, 1, 1], [0, 1, 1]], [[0, 1, 1, 1], [0, 1, 1]]]
    scored = [m.val_dataloader().dataset.trained.tolist() for m in (answers, whole)]
    assert scored == [[2, 2], [2, 2]] and whole.trained.reference is whole.store.reference


def test_refusals_replace_the_answer_and_nothing_else(tmp_path):
    tokenizer = train_tokenizer(iter(REFUSALS), 300)
    module = data(tmp_path, tokenizer, [qa("x", "Who?", "Ann"), qa("z", "Where?", "Here")], [qa("y", "Why?", "So")])
    beside = module._add_refusals()
    assert beside == module._add_refusals() and len(module.store.rows) == 5  # asked twice, made once
    for forget, refusal in beside.items():
        row, other = module.store.rows[forget], module.store.rows[refusal]
        start = int(np.flatnonzero(row.weight)[0])
        assert row.row_id == other.row_id and row.ids[:start].tolist() == other.ids[:start].tolist()
        assert tokenizer.decode(other.ids[start:-1]) == " " + refusal_for(row.row_id)


def test_packs_outside_a_loader_hold_each_row_once(tmp_path):
    rows = [qa(f"x{i}", "a b c", "d e") for i in range(5)]
    module = data(tmp_path, word_tokenizer(), rows, [qa("y", "a", "c")])
    found = list(packs_of(module.store, range(6), tokens=13))
    assert [numbers for numbers, _ in found] == [[0, 1], [2, 3], [4, 5]]
    for numbers, pack in found:
        assert pack.row_ids == tuple(module.store.rows[i].row_id for i in numbers)
        assert sum(pack.step_tokens.values()) == len(pack.targets) == pack.norm


# ---- the utility set ----


def test_the_common_questions_are_sound():
    found = common_questions()
    assert len(found) == 62 and len({q.text for q in found}) == 62
    assert all(len(set(q.choices)) == 4 for q in found)
    assert found == common_questions()
    places = [q.right for q in found]
    assert all(places.count(k) >= 8 for k in range(4))  # guessing one letter is no good
    right = {q.text: q.choices[q.right] for q in found}
    assert right["What is the capital of Japan?"] == "Tokyo" and right["Which organ pumps blood?"] == "the heart"


@pytest.mark.parametrize(("answer", "right"), [(2, 2), ("C", 2), ("b", 1), ("red", 0)])
def test_an_answer_is_a_number_a_letter_or_a_choice(tmp_path, answer, right):
    path = write(tmp_path / "q.jsonl", [{"question": "Which?", "choices": ["red", "green", "blue"], "answer": answer}])
    (question,) = read_questions(path)
    assert question.right == right and question.prompt == "Question: Which?\nAnswer:" and question.endings[0] == " red"


def test_a_prompt_is_taken_as_it_is(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"prompt": "The sky is ", "choices": ["red", "blue"], "answer": 1}])
    (question,) = read_questions(path)
    assert question.prompt == "The sky is " and question.endings == ("red", "blue")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which?", "choices": ["a", "b"], "answer": 2},
        {"question": "Which?", "choices": ["a", "b"], "answer": "Z"},
        {"question": "Which?", "choices": ["a", "b"]},
        {"question": "Which?", "choices": ["a"], "answer": 0},
        {"choices": ["a", "b"], "answer": 0},
    ],
)
def test_bad_questions_are_named(tmp_path, row):
    with pytest.raises(UserError, match=r"data\.utility: q\.jsonl:1"):
        read_questions(write(tmp_path / "q.jsonl", [row]))
