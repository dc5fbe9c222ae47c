"""Files that are complete or absent, in each format."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from lit_reason.data.reading.row_files import complete_or_absent, row_suffix, row_writer
from lit_reason.errors import UserError

ROWS = [{"a": "é\n", "n": 1}, {"a": "", "n": None}]


def write(path, rows, like="x.jsonl"):
    with complete_or_absent(path) as part, row_writer(part, path, like) as put:
        return [put(row) for row in rows]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.jsonl", lambda p: [json.loads(line) for line in p.read_text("utf-8").splitlines()]),
        ("a.ndjson", lambda p: [json.loads(line) for line in p.read_text("utf-8").splitlines()]),
        ("a.json", lambda p: json.loads(p.read_text("utf-8"))),
        ("a.json.gz", lambda p: json.load(gzip.open(p, "rt", encoding="utf-8"))),
        ("a.jsonl.xz", lambda p: [json.loads(line) for line in lzma.open(p, "rt", encoding="utf-8")]),
    ],
)
def test_rows_come_back(tmp_path, name, read):
    sizes = write(tmp_path / name, ROWS)
    assert read(tmp_path / name) == ROWS
    assert sizes[1] == len('{"a": "", "n": null}')
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_parquet_keeps_its_columns(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    source = tmp_path / "in.parquet"
    schema = pyarrow.schema([("a", pyarrow.string()), ("n", pyarrow.int32())])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 200, schema=schema), source)
    write(tmp_path / "out.parquet", ROWS * 200, str(source))
    back = parquet.read_table(tmp_path / "out.parquet")
    assert back.schema.equals(schema) and back.to_pylist() == ROWS * 200
    with pytest.raises(UserError, match="parquet"):
        write(tmp_path / "other.parquet", ROWS)
    assert not (tmp_path / "other.parquet").exists()


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError()])
def test_nothing_is_left_after_an_error(tmp_path, error):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(type(error)), complete_or_absent(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_says_where(tmp_path):
    with pytest.raises(OSError) as full, complete_or_absent(tmp_path / "a.jsonl"):
        raise OSError(28, "No space left on device")  # as a write has it: without a name
    assert full.value.filename == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz", "a.jsonl.zip"])
def test_unknown_kinds_are_refused(name):
    with pytest.raises(UserError, match="must end in"):
        row_suffix(Path(name))


def test_a_near_kind_is_suggested():
    with pytest.raises(UserError, match="did you mean '.jsonl'"):
        row_suffix(Path("a.jsonll"))
