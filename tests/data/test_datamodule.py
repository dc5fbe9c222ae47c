"""TraceData: from files to packs, and what it says when something is wrong."""

import json
import random

import pytest
from tiny_run import trace_record, write_model, write_traces
from transformers import AutoTokenizer

from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.datamodule import TraceData
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.rendering.render import Renderer
from lit_reason.errors import UserError

SHORT = {"min_tokens": 0, "min_chars": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """`make(train_file=..., ...)`: a data module that is set up for fitting."""

    def build(stage="fit", rows=40, **settings):
        if "train_file" not in settings:
            settings["train_file"] = str(write_traces(tmp_path / "traces.jsonl", rows))
        data = TraceData(**{"max_length": 128, "cache_dir": str(tmp_path / "cache")} | settings)
        data.tokenizer = tokenizer
        data.setup(stage)
        return data

    return build


def write_lines(path, lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return str(path)


def test_full_traces_are_plain_fine_tuning(make, tokenizer):
    """Strategy `full` gives the very rows that rendering without any condenser gives."""
    data = make(condense=CondenseConfig(strategy="full", **SHORT))
    renderer = Renderer(tokenizer, RenderConfig())
    lines = open(data.files["train"]).read().splitlines()
    for i, line in enumerate(lines):
        plain = renderer.rows(to_conversation(json.loads(line), f"traces.jsonl:{i + 1}"))[0]
        stored = data.stores["train"].row(i)
        assert stored.ids.tolist() == plain.ids.tolist() and stored.weight.tolist() == plain.weight.tolist()
        assert stored.row_id == plain.row_id


def test_holdout_rows_leave_training_and_become_prompts(make):
    data = make(holdout=7)
    train, val = set(data.stores["train"].row_ids), set(data.stores["val"].row_ids)
    assert not train & val and len(train | val) == 40 and len(val) >= 7
    prompts = data.eval_prompts()
    assert {p.row_id for p in prompts} == val
    assert len(data.eval_prompts(3)) == 3
    assert all(p.answer == str(sum(map(int, p.text.split(" + ")))) for p in prompts)
    assert all(data.tokenizer.decode(p.ids).endswith("<assistant>") for p in prompts)


def test_equal_questions_stay_on_one_side_of_the_holdout(make, tmp_path):
    rng = random.Random(0)
    records = [trace_record(rng) for _ in range(10)]
    file = write_lines(tmp_path / "twice.jsonl", [json.dumps(r) for r in records * 3])
    data = make(train_file=file, holdout=4)
    questions = {f"twice.jsonl:{i + 1}": r["messages"][0]["content"] for i, r in enumerate(records * 3)}
    sides = [{questions[r] for r in data.stores[s].row_ids} for s in ("train", "val")]
    assert not sides[0] & sides[1]


def test_the_holdout_depends_on_the_seed_and_not_on_the_order(make, tmp_path):
    lines = [json.dumps(trace_record(random.Random(i))) for i in range(30)]
    chosen = []
    for seed, order in [(0, lines), (0, lines[::-1]), (1, lines)]:
        data = make(train_file=write_lines(tmp_path / "x.jsonl", order), holdout=5, seed=seed)
        chosen.append({p.text for p in data.eval_prompts()})
    assert chosen[0] == chosen[1] != chosen[2]


def test_long_rows_are_dropped_counted_or_refused(make):
    kept = make(max_length=40)
    lengths = make().stores["train"].lengths
    assert len(kept.stores["train"]) == (lengths <= 40).sum() < 40
    assert kept.ledger["dropped"] == {"dropped: longer than 40 tokens": int((lengths > 40).sum())}
    with pytest.raises(UserError, match=r"traces.jsonl:\d+ has \d+ tokens, data.max_length is 40"):
        make(max_length=40, over_length="raise")


def test_fitted_rows_keep_edges_and_answer(make):
    data = make(max_length=40, over_length="fit", condense=CondenseConfig(**SHORT))
    store = data.stores["train"]
    assert len(store) == 40 and store.lengths.max() <= 40
    assert data.ledger["dropped"]["condensed further to fit max_length"] > 0
    for i in range(40):
        text = data.tokenizer.decode(store.row(i).ids)
        question = text.split("<assistant>")[0].removeprefix("<user>").strip()
        assert f"the {question} ." in text and f"so {question} = " in text and text.endswith("<end>")


def test_condensation_is_told_at_the_start(make, caplog):
    with caplog.at_level("INFO"):
        data = make(condense=CondenseConfig(strategy="epic", **SHORT))
    whole, short = make().stores["train"].lengths.sum(), data.stores["train"].lengths.sum()
    [line] = [r.message for r in caplog.records if "condensed" in r.message]
    told = int(line.split("rows: ")[1].split("%")[0]) / 100
    assert "of 40 rows" in line and told == pytest.approx(1 - short / whole, abs=0.08)


def test_bad_rows_are_set_aside_with_their_reason(make, tmp_path):
    good = [json.dumps(trace_record(random.Random(i))) for i in range(5)]
    bad = ["{not json", "[1, 2]", b'{"messages": "\xff"}', '{"colour": "red"}', '{"messages": []}']
    bad.append('{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    bad.append('{"messages": [{"role": "user", "content": "a"}]}')
    data = make(train_file=write_lines(tmp_path / "mixed.jsonl", good + bad))
    assert len(data.stores["train"]) == 5
    assert sum(data.ledger["bad_rows"].values()) == len(bad)
    lines = next((tmp_path / "cache").glob("*.quarantine.jsonl")).read_text().splitlines()
    rows = [json.loads(line)["row"] for line in lines]
    assert rows == [f"mixed.jsonl:{i}" for i in range(6, 13)]
    with pytest.raises(UserError, match="max_bad_rows|bad rows"):
        make(train_file=str(tmp_path / "mixed.jsonl"), max_bad_rows=3)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty|no row"),
        (b"\n\n", "no .*row"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no train row is left"),
    ],
)
def test_files_without_a_usable_row_are_refused(make, tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        make(train_file=str(tmp_path / "x.jsonl"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "no half store is left"


def test_a_missing_file_is_named_with_its_neighbour(make, tmp_path):
    write_traces(tmp_path / "traces.jsonl")
    with pytest.raises(UserError, match="trace.jsonl.*traces.jsonl"):
        make(train_file=str(tmp_path / "trace.jsonl"))
    with pytest.raises(UserError, match="train_file is missing"):
        make(train_file=None)
    for stage, words in (("test", "test_file is missing"), ("validate", "nothing to validate")):
        with pytest.raises(UserError, match=words):
            make(stage)
    with pytest.raises(UserError, match="nothing to answer"):
        make("predict").predict_dataloader()


def test_the_cache_is_keyed_by_what_matters(make, tmp_path, tokenizer):
    def folder(**settings):
        return make(**settings).stores["train"].folder

    first = folder()
    assert folder() == first
    assert folder(batch_tokens=999, seed=3, workers=2) == first
    other = [
        folder(condense=CondenseConfig(strategy="epic", **SHORT)),
        folder(condense=CondenseConfig(strategy="epic", tau=0.4, **SHORT)),
        folder(render=RenderConfig(weights={"solution": 2.0})),
        folder(max_length=100),
        folder(rows=41),
        folder(format="messages"),
    ]
    tokenizer_template = tokenizer.chat_template
    tokenizer.chat_template = tokenizer_template + "{# another #}"
    try:
        other.append(folder())
    finally:
        tokenizer.chat_template = tokenizer_template
    assert len({first, *other}) == len(other) + 1
