"""`lit-reason condense`: formats, files, messages, memory, and options that follow the configuration."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from lit_reason.cli import condense as command
from lit_reason.cli.door import main as door
from lit_reason.data.config import CondenseConfig
from lit_reason.data.reading.formats import to_conversation
from lit_reason.errors import UserError

TEN = [f"thought number {i} of all" for i in range(10)]
TRACE = "\n" + "\n\n".join(TEN) + "\n"
SHORT = "\n" + "\n\n".join([*TEN[:3], *TEN[8:]]) + "\n"
INLINE, KEPT = f"<think>{TRACE}</think>7", f"<think>{SHORT}</think>7"


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(json.dumps(row) for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def run(*arguments):
    return command.main([str(a) for a in arguments])


ROWS = {
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": INLINE}], "id": 3},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": KEPT}], "id": 3},
    ),
    "parts": (
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": [{"type": "text", "text": INLINE}]}]},
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": [{"type": "text", "text": KEPT}]}]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": INLINE}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": KEPT}]},
    ),
    "alpaca": (
        {"instruction": "q", "input": "", "output": INLINE},
        {"instruction": "q", "input": "", "output": KEPT},
    ),
    "field": (
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": "7", "reasoning_content": TRACE}]},
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": "7", "reasoning_content": SHORT}]},
    ),
    "generations": (
        {"problem": "q", "generations": ["wrong", INLINE], "correctness_math_verify": [False, True]},
        {"problem": "q", "generations": ["wrong", KEPT], "correctness_math_verify": [False, True]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_keep_their_format(tmp_path, name, suffix):
    before, after = ROWS[name]
    out = tmp_path / f"out{suffix}"
    assert run(write(tmp_path / f"in{suffix}", [before] * 3), out, "--min-tokens", 0) == 0
    assert read(out) == [after] * 3
    ledger = json.loads((tmp_path / f"out{suffix}.ledger.json").read_text())
    assert ledger["rows"] == {"condensed": 3} and ledger["thoughts"]["before"] == 30
    assert ledger["config"]["strategy"] == "epic" and "approximate" in ledger["tokens_are"]


def test_a_list_of_thoughts_stays_a_list(tmp_path):
    thoughts = ["a", "b", "c", "d", "e"]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "7", "thinking": thoughts}]}
    run(write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl", "--segmenter", "presplit", "--min-tokens", 0)
    assert read(tmp_path / "out.jsonl")[0]["messages"][1]["thinking"] == ["a", "b", "e"]


def test_full_gives_the_rows_back(tmp_path):
    rows = [before for before, _ in ROWS.values()]
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--strategy", "full")
    assert read(tmp_path / "out.jsonl") == rows


def test_summary_says_what_was_counted(tmp_path, capsys):
    rows = [ROWS["alpaca"][0], {"instruction": "q", "output": "no thinking"}, {"nonsense": 1}]
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--min-tokens", 0)
    said = capsys.readouterr().out
    for part in (
        "1  condensed",
        "1  unchanged: no trace",
        "10 -> 5",
        "approximate",
        "bad rows: 1",
        "out.jsonl.ledger.json",
    ):
        assert part in said
    assert "predicted time saved" in said
    assert len(read(tmp_path / "out.jsonl")) == 2
    assert len(read(tmp_path / "out.jsonl.quarantine.jsonl")) == 1


def test_a_models_tokenizer_counts_exactly(tmp_path, tokenizer_folder):
    folder, count = tokenizer_folder
    run(write(tmp_path / "in.jsonl", [ROWS["alpaca"][0]]), tmp_path / "o.jsonl", "--min-tokens", 0, "--model", folder)
    ledger = json.loads((tmp_path / "o.jsonl.ledger.json").read_text())
    assert ledger["tokens_are"] == f"tokens of {folder}"
    thoughts = to_conversation(ROWS["alpaca"][0], "r").messages[1].content.split("think>")[1][:-2].split("\n\n")
    pieces = [t + "\n\n" for t in thoughts[:-1]] + thoughts[-1:]
    assert ledger["tokens_before"]["trace"] == sum(count(piece) for piece in pieces)


@pytest.fixture
def tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    return str(folder), lambda text: len(tokenizer.encode(text, add_special_tokens=False))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "0"], r"\(0, 1\]"),
        (["--tau", "x"], "--tau"),
        (["--rho", "2"], r"\[0, 1\]"),
        (["--strategy", "epik"], "did you mean 'epic'"),
        (["--stategy", "epic"], "did you mean '--strategy'"),
        (["--min-token", "3"], "did you mean '--min-tokens'"),
        (["--format", "sharegtp"], "did you mean 'sharegpt'"),
        (["--segmenter", "regex"], "pattern"),
        (["--strategy", "truncate"], "training"),
        (["--strategy", "token"], "scorer"),
        (["--on-missing", "drop"], "no row .* is left"),
        (["--on-missing", "raise", "--max-bad-rows", "0"], "bad rows"),
        (["--model", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path, arguments, message):
    source = write(tmp_path / "in.jsonl", [{"instruction": "q", "output": "no thinking"}])
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out.jsonl", *arguments)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out.jsonl.l")) or p.name == "out.jsonl"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("in.jsonl", "in.jsonl", "same file"),
        ("i*.jsonl", "in.jsonl", "same file"),
        ("in.jsonl", "link.jsonl", "same file"),
        ("in.jsonl", "no/such/out.jsonl", "no folder"),
        ("in.jsonl", "out.csv", "must end in"),
        ("in.jsonl", "there.jsonl", "--overwrite"),
        ("in.jsonl", "left.jsonl", "--overwrite"),
        ("in.jsonl", "folder.jsonl", "is a folder"),
        ("absent.jsonl", "out.jsonl", "no such file"),
        ("empty.jsonl", "out.jsonl", "empty"),
        ("no.parquet", "out.parquet", "cannot read the parquet file .*no.parquet"),
        ("other.json", "out.jsonl", r"nothing was written(.*\n)*bad rows: 1 \(1 x unknown format\)"),
    ],
)
def test_wrong_paths_are_refused(tmp_path, source, target, message):
    write(tmp_path / "in.jsonl", [ROWS["alpaca"][0]])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    for name in ("there.jsonl", "left.jsonl.ledger.json", "empty.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "no.parquet", [ROWS["alpaca"][0]])
    (tmp_path / "other.json").write_text('{"a": 1}')
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        run(tmp_path / source, tmp_path / target)
    assert [p.name for p in sorted(tmp_path.iterdir()) if "quarantine" not in p.name] == before


def test_overwrite_replaces_all_that_an_earlier_run_left(tmp_path):
    source = write(tmp_path / "in.jsonl", [ROWS["alpaca"][0]])
    for name in ("out.jsonl", "out.jsonl.ledger.json", "out.jsonl.quarantine.jsonl"):
        (tmp_path / name).write_text("old")
    run(source, tmp_path / "out.jsonl", "--overwrite", "--min-tokens", 0)
    assert read(tmp_path / "out.jsonl") == [ROWS["alpaca"][1]]
    assert not (tmp_path / "out.jsonl.quarantine.jsonl").exists()
    assert "old" not in (tmp_path / "out.jsonl.ledger.json").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in.jsonl", [ROWS["alpaca"][0]])
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    real = open

    def full(path, mode="r", *args, **kwargs):
        return real("/dev/full" if str(path).endswith(".part") else path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    assert door(["condense", source, str(out), "--overwrite"]) == 1
    monkeypatch.undo()
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


# Options


def test_every_setting_is_an_option_with_its_help_and_default():
    text = " ".join(command.build_parser().format_help().split())
    helps = command.field_help(CondenseConfig)
    fields = dataclasses.fields(CondenseConfig)
    assert set(helps) == {field.name for field in fields}
    actions = {action.dest: action for action in command.build_parser()._actions}
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in text
        assert helps[field.name].split(".")[0].split("`")[0].strip()[:20] in text
        assert actions[field.name].default == ("epic" if field.name == "strategy" else field.default)


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom lit_reason.cli.door import main\nassert main(['condense', '--help']) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'tqdm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--tau" in done.stdout


def test_the_door_says_it_in_one_message(tmp_path, capsys):
    assert door(["condense", str(tmp_path / "absent.jsonl"), str(tmp_path / "o.jsonl")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lit-reason: no such file") and "Traceback" not in said
    assert door(["condense", "only-one"]) == 2


def test_approximate_tokens_by_hand():
    assert command.approximate_tokens("") == 0
    assert command.approximate_tokens("So it is 42.\n\n") == 7  # So it is 4 2 . and the line breaks
    assert command.approximate_tokens("reasoning") == 2
    assert command.approximate_tokens("é_ü") == 3


# Memory


def _big(path, rows):
    filler = "\n\n".join(f"this is thought number {i} of a longer trace" for i in range(60))
    line = json.dumps({"instruction": "q", "output": f"<think>\n{filler}\n</think>7"}) + "\n"
    with path.open("w") as file:
        for _ in range(rows):
            file.write(line)
    return path.stat().st_size


def _peak(tmp_path, rows):
    size = _big(tmp_path / "in.jsonl", rows)
    tracemalloc.start()
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--overwrite")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size, peak


def test_memory_does_not_grow_with_the_file(tmp_path):
    _peak(tmp_path, 5)  # imports
    small, low = _peak(tmp_path, 100)
    large, high = _peak(tmp_path, 500)
    assert large - small > 1_000_000
    assert high - low < 200_000


@pytest.mark.slow
def test_thirty_megabytes_in_constant_memory(tmp_path):
    _peak(tmp_path, 5)
    size, peak = _peak(tmp_path, 11_000)
    assert size > 30_000_000
    assert peak < 8_000_000
