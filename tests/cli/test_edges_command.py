"""`lit-reason edges` from the front door, on a tiny student that was never trained."""

from __future__ import annotations

import json
import re

import pytest

from lit_reason.cli import door
from lit_reason.tasks import chain
from lit_reason.tasks.student import StudentConfig, write_student

TASK = chain.ChainConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    write_student(folder / "model", chain.words(TASK), StudentConfig(width=32))
    lines = [json.dumps(chain.record(TASK, 0, index, held_out=False)) for index in range(8)]
    plain = [{"role": "user", "content": "given a0"}, {"role": "assistant", "content": " 3"}]
    lines[2:2] = [json.dumps({"messages": plain}), "not JSON"]
    (folder / "traces.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(folder, *more: str) -> int:
    return door.main(["edges", str(folder / "traces.jsonl"), "--model", str(folder / "model"), *more])


def test_prints_a_table_and_writes_it(folder, tmp_path, capsys):
    assert run(folder, "--limit", "6", "--out", str(tmp_path / "edges.json")) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "edges.json").read_text())
    assert written["traces"] == 6
    assert set(written["skipped"].values()) == {1} and "no trace" in written["skipped"] and len(written["skipped"]) == 2
    assert "fewer than 256 traces" in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert float(rows["prompt"][1]) == pytest.approx(written["nll_prompt"], abs=1e-4)
    for name, part in written["parts"].items():
        cells = rows[f"prompt + {name}"][3:]
        want = [part["tokens"], part["nll"], part["drop"], part["drop_low"], part["drop_high"]]
        assert [float(c) for c in cells[:4] + cells[5:6]] == pytest.approx(want, abs=0.051)
        assert (len(cells) == 8) == (name != "all")
    assert max(len(line) for line in printed.splitlines()[:6]) <= 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--limit", "3"], "3 usable traces"),
        (["--max-length", "20"], r"no usable row .*8 x longer than 20 tokens.*\n  traces.jsonl:3: no trace: "),
        (["--segmentor", "cue"], "did you mean '--segmenter'"),
        (["--out", "/no/such/folder/edges.json"], "no folder /no/such/folder"),
    ],
)
def test_refusals(folder, capsys, more, message):
    assert run(folder, *more) == 2
    assert re.search(message, capsys.readouterr().err)
