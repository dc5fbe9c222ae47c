"""Reading: what each kind of source yields, what goes to quarantine and why, and which files stop the run."""

import builtins
import gzip
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_reason.data.reading import pieces
from lit_reason.data.reading.records import Quarantine, read_records
from lit_reason.data.reading.tables import hub_id
from lit_reason.errors import RowError, UserError

ROWS = [{"text": "a"}, {"text": 'ü\u2028 [{]},\\" b', "n": [1, {"x": None}]}, {"text": "c\nd"}]


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path as text."""

    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        return str(path)

    return write


def read(path, max_bad_rows=100, quarantine=None, **options):
    """All records, and the quarantine they left behind."""
    quarantine = quarantine or Quarantine(None, max_bad_rows)
    return list(read_records(path, quarantine, **options)), quarantine


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def named(name, rows, numbers=None):
    return [(f"{name}:{number}", row) for number, row in zip(numbers or range(1, len(rows) + 1), rows, strict=True)]


# --- kinds of files


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.data", "a"])
def test_one_object_a_line(write, name):
    assert read(write(name, lines_of(ROWS)))[0] == named(name, ROWS)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_one_list_of_objects(write, name, indent):
    path = write(name, " \n" + json.dumps(ROWS, indent=indent, ensure_ascii=indent is None) + "\n \n")
    assert read(path)[0] == named(name, ROWS)


def test_line_numbers_count_blank_lines_and_line_ends_may_be_any(write):
    path = write("a.jsonl", '\n{"a": 1}\r\n   \n{"a": 2}\n\n{"a": 3}')
    assert read(path)[0] == named("a.jsonl", [{"a": 1}, {"a": 2}, {"a": 3}], [2, 4, 6])


@pytest.mark.parametrize("body", [lines_of(ROWS), json.dumps(ROWS)])
def test_byte_order_mark_is_skipped(write, body):
    assert read(write("a.json", b"\xef\xbb\xbf" + body.encode()))[0] == named("a.json", ROWS)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.xz"])
def test_packed_files_are_known_by_their_content(write, pack, name):
    assert read(write(name, pack(lines_of(ROWS).encode())))[0] == named(name, ROWS)
    assert read(write(name, pack(json.dumps(ROWS).encode())))[0] == named(name, ROWS)


def test_plain_text_is_cut_at_blank_lines(write):
    path = write("a.txt", "\none\ntwo\n\n \nthree\r\nfour\n\n[five]")
    expected = [{"text": "one\ntwo"}, {"text": "three\nfour"}, {"text": "[five]"}]
    assert read(path)[0] == named("a.txt", expected, [2, 6, 9])


def test_several_sources_in_the_order_given(write):
    a, b = write("x/a.jsonl", '{"n": 1}'), write("x/b.jsonl", '{"n": 2}')
    expected = [("a.jsonl:1", {"n": 1}), ("b.jsonl:1", {"n": 2})]
    assert read([a, Path(b)])[0] == expected
    assert read([b, a])[0] == expected[::-1]
    assert read(f"{a}, {b}")[0] == expected
    assert read(str(Path(a).parent / "*.jsonl"))[0] == expected
    with pytest.raises(UserError, match=r"no file matches the pattern .*\*\.csv"):
        read(str(Path(a).parent / "*.csv"))
    with pytest.raises(UserError, match="list of files is empty"):
        read([])


def test_files_of_one_name_keep_their_rows_apart(write):
    paths = [write("x/a.jsonl", '{"n": 1}'), write("y/a.jsonl", '{"n": 2}'), write("y/b.jsonl", '{"n": 3}')]
    assert [row_id for row_id, _ in read(paths)[0]] == [f"{paths[0]}:1", f"{paths[1]}:1", "b.jsonl:1"]


def test_a_name_with_a_comma_or_brackets_is_a_file_when_it_exists(write):
    assert len(read(write("a,b[1].jsonl", '{"n": 1}'))[0]) == 1


# --- bad rows

BAD_LINES = [
    (b'{"a": 1', "not JSON", "not JSON: Expecting ',' delimiter at column 8"),
    (b"hello", "not JSON", "not JSON: Expecting value at column 1"),
    (b'{"a": 1} {"b": 2}', "not JSON", "not JSON: Extra data at column 10"),
    (b"[1, 2]", "not an object", "got list"),
    (b"3", "not an object", "got int"),
    (b'{"a": "\xff"}', "not UTF-8", "not UTF-8: byte 0xff at column 8"),
    (b'{"a": 1, "a": 2}', "duplicate key", "'a' stands twice"),
    (b'{"x": {"a": 1, "a": 2}}', "duplicate key", "'a' stands twice"),
    (b'{"a": "\\ud83d"}', "broken character", "\\ud83d is half a surrogate pair"),
    (b'{"\\uDC00": 1}', "broken character", "\\udc00 is half"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON", "digit"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON", "nested too deeply"),
]


@pytest.mark.parametrize(("bad", "short", "reason"), BAD_LINES)
def test_a_bad_line_costs_only_itself(write, tmp_path, bad, short, reason):
    path = write("a.jsonl", b'{"n": 1}\n' + bad + b'\n{"n": 2}\n')
    with Quarantine(tmp_path / "q" / "bad.jsonl", 1) as quarantine:
        rows, _ = read(path, quarantine=quarantine)
    assert rows == named("a.jsonl", [{"n": 1}, {"n": 2}], [1, 3])
    assert quarantine.counts == {short: 1} and quarantine.total == 1
    (line,) = (tmp_path / "q" / "bad.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["row"] == "a.jsonl:2"
    assert reason in line["reason"]
    assert line["raw"] == bad.decode("utf-8", "backslashreplace")[:2000]


@pytest.mark.parametrize(
    ("bad", "short"),
    [(b'{"a" 1}', "not JSON"), (b"7", "not an object"), (b'{"a": "\xff"}', "not UTF-8"), (b"", "not JSON")],
)
def test_a_bad_item_of_a_list_costs_only_itself(write, bad, short):
    rows, quarantine = read(write("a.json", b'[{"n": 1},\n' + bad + b', {"n": 2}]'))
    assert rows == named("a.json", [{"n": 1}, {"n": 2}], [1, 3])
    assert quarantine.counts == {short: 1}


def test_a_bad_item_over_several_lines_tells_the_line(write, tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", 9)
    read(write("a.json", '[{"n": 1}, {\n "a": 1\n "b": 2}]'), quarantine=quarantine)
    assert "at line 3 of the row, column 2" in (tmp_path / "q.jsonl").read_text()


def test_numbers_that_json_does_not_know_pass(write):
    rows, quarantine = read(write("a.jsonl", '{"a": NaN, "b": -Infinity}'))
    assert repr(rows[0][1]) == "{'a': nan, 'b': -inf}" and not quarantine.total


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_row_limit_counts_the_bytes_of_a_row(write, name):
    row = {"text": "x" * 50}
    size = len(json.dumps(row))
    body = lines_of([row, {"n": 1}]) if name == "a.jsonl" else json.dumps([row, {"n": 1}])
    assert len(read(write(name, body), max_row_bytes=size)[0]) == 2
    assert len(read(write(name, body.replace("\n", "\r\n")), max_row_bytes=size)[0]) == 2
    rows, quarantine = read(write(name, body), max_row_bytes=size - 1)
    assert [record for _, record in rows] == [{"n": 1}]
    assert quarantine.counts == {"row too large": 1}


def test_the_size_of_a_paragraph_counts_its_line_breaks(write):
    path = write("a.txt", "one\n\nthree\nfour\nfive\n\nsix")
    assert len(read(path, max_row_bytes=15)[0]) == 3
    rows, quarantine = read(path, max_row_bytes=14)
    assert rows == named("a.txt", [{"text": "one"}, {"text": "six"}], [1, 7])
    assert quarantine.counts == {"row too large": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_row_of_many_megabytes_is_skipped_without_holding_it(write, tmp_path, name):
    large = b'{"text": "' + b"x" * 24_000_000 + b'"}'
    if name == "a.json":
        path = write(name, b'[{"n": 1},' + large + b', {"n": 2}]')
    else:
        path = write(name, b'{"n": 1}\n\n' + large + b'\n\n{"n": 2}')
    quarantine = Quarantine(tmp_path / "q.jsonl", 1)
    tracemalloc.start()
    rows, _ = read(path, quarantine=quarantine, max_row_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 2
    assert peak < 8_000_000
    line = json.loads((tmp_path / "q.jsonl").read_text())
    assert line["reason"] == f"row too large: {len(large):,} bytes, the limit is 1,000,000 (max_row_bytes)"
    assert line["raw"] == large[:2000].decode()


def test_ten_megabytes_are_the_default_limit(write):
    rows, quarantine = read(
        write("a.jsonl", '{"n": 1}\n{"a": "' + "x" * (10_000_000 - 9) + '"}\n{"a": "' + "x" * (10_000_000 - 8) + '"}')
    )
    assert len(rows) == 2 and quarantine.counts == {"row too large": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_large_file_streams_in_little_memory(tmp_path, name):
    path, count = tmp_path / name, 20_000
    row = json.dumps({"text": "x" * 2000})
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("[" + ",".join([row] * count) + "]" if "json." in name else (row + "\n") * count)
    tracemalloc.start()
    seen = sum(len(record["text"]) for _, record in read_records(str(path), Quarantine(None, 0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count * 2000
    assert peak < 6_000_000  # of 40 MB


def test_rows_come_before_the_file_is_read_to_its_end(write):
    path = write("a.jsonl", lines_of([{"n": 1}]) + "broken\n")
    stream = read_records(path, Quarantine(None, 0))
    assert next(stream) == ("a.jsonl:1", {"n": 1})
    with pytest.raises(UserError, match="more than 0 bad rows"):
        next(stream)


# --- sources that cannot be read


def test_a_missing_file_suggests_its_neighbour_at_once(write):
    path = write("train.jsonl", '{"a": 1}')
    with pytest.raises(UserError, match=r"no such file: .*tran.jsonl \(did you mean 'train.jsonl'\?\)"):
        read_records(path.replace("train", "tran"), Quarantine(None, 0))
    with pytest.raises(UserError, match="no such file: .*there is no folder"):
        read_records(path.replace("train", "nowhere/train"), Quarantine(None, 0))
    with pytest.raises(UserError, match="no such file"):
        read_records("x" * 5000 + ".jsonl", Quarantine(None, 0))


def test_a_misspelt_file_without_suffix_in_a_real_folder_is_no_hub_id(write, monkeypatch):
    monkeypatch.chdir(Path(write("data/train", "{}")).parent.parent)
    with pytest.raises(UserError, match=r"no such file: data/trian \(did you mean 'train'"):
        read_records("data/trian", Quarantine(None, 0))


def test_a_folder_that_is_no_data_set_names_the_files_in_it(write):
    folder = Path(write("f/train.jsonl", "{}")).parent
    with pytest.raises(UserError, match="is a folder, but not one written by .*it holds train.jsonl"):
        read_records(str(folder), Quarantine(None, 0))


@pytest.mark.parametrize("data", [b"", gzip.compress(b"", mtime=0), lzma.compress(b"")])
def test_an_empty_file(write, data):
    with pytest.raises(UserError, match="the file is empty"):
        read(write("a.jsonl", data))


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.json", " [ ] \n"), ("a.txt", " \n")]
)
def test_a_file_without_rows(write, name, data):
    with pytest.raises(UserError, match="holds no rows"):
        read(write(name, data))


def test_a_file_of_bad_rows_only_is_refused_even_below_the_limit(write):
    with pytest.raises(UserError, match="not one usable row\nbad rows: 2 .2 x not JSON."):
        read(write("a.jsonl", "x\ny\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.bin", "a"])
def test_an_unknown_kind_of_file(write, name):
    with pytest.raises(UserError, match="unknown kind of file; allowed are .jsonl"):
        read(write(name, "a,b\n1,2\n"))


def test_utf16_is_named(write):
    with pytest.raises(UserError, match="UTF-16"):
        read(write("a.jsonl", '{"a": 1}'.encode("utf-16")))


def test_json_of_another_shape(write):
    with pytest.raises(UserError, match="neither a list of objects nor one object a line"):
        read(write("a.json", json.dumps({"data": [1]}, indent=1)))


def test_a_bad_line_in_a_json_file_of_lines(write):
    rows, quarantine = read(write("a.json", '{"a": 1}\n{"a" 2}\n{"a": 3}'))
    assert rows == named("a.json", [{"a": 1}, {"a": 3}], [1, 3]) and quarantine.total == 1


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_cut_archive_yields_what_it_holds_and_then_stops(write, pack):
    data = pack(os.urandom(300_000).hex().encode().join([b'{"a": 1}\n{"b": "', b'"}\n']))
    stream = read_records(write("a.jsonl", data[: len(data) // 2]), Quarantine(None, 0))
    assert next(stream) == ("a.jsonl:1", {"a": 1})
    with pytest.raises(UserError, match="cannot read .* after a.jsonl:1: .*end"):
        next(stream)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('[{"a": 1}, {"b": ', "not closed: it was cut short in item 2"),
        ('[{"a": 1}, {"b": "x', "not closed: it was cut short in item 2"),
        ('[{"a": 1}, {"b": 2}', "not closed"),
        ('[{"a": 1}, {"b": [2}, {"c": 3}]', "item 2, or a bracket is missing there"),
        ('[{"a": 1}] {"b": 2}', "ends after item 1, but more text follows"),
        ('[{"a": 1}]' + " " * 3_000_000 + "x", "more text follows"),
        ('[{"a": 1}}, {"b": 2}]', "ends after item 1, but more text follows"),
    ],
)
def test_a_list_that_is_cut_or_followed_by_something(write, body, message):
    stream = read_records(write("a.json", body), Quarantine(None, 9))
    with pytest.raises(UserError, match=message):
        list(stream)


def test_no_permission(write, monkeypatch):
    path = write("a.jsonl", '{"a": 1}')

    def refuse(file, *args, **options):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a.jsonl at its beginning: Permission denied$"):
        read(path)


# --- the scanner of lists against the json module

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["\\", '"', '\\"', "]["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


class SmallReads(io.BytesIO):
    """A stream that gives few bytes at a time, so that every border of chunks is met."""

    def __init__(self, data, most):
        super().__init__(data)
        self.most = most

    def read1(self, size=-1):
        return super().read1(self.most)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, max_size=4), st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_list_items_are_those_of_the_json_module(items, most, indent, ascii):
    data = json.dumps(items, indent=indent, ensure_ascii=ascii).encode()
    found = list(pieces.list_items(SmallReads(data, most), 10**6))
    assert [index for index, _, _ in found] == list(range(1, len(items) + 1))
    assert [json.loads(raw) for _, raw, _ in found] == items
    assert [size for _, _, size in found] == [len(raw) for _, raw, _ in found]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b)), st.integers(1, 8))
def test_lines_keep_number_size_and_bytes(chunks, limit):
    found = list(pieces.lines(io.BufferedReader(io.BytesIO(b"\n".join(chunks))), limit))
    kept = [(number, chunk.rstrip(b"\r\n")) for number, chunk in enumerate(chunks, 1)]
    kept = [(number, chunk) for number, chunk in kept if chunk.strip()]
    assert [(number, raw) for number, raw, size in found if size <= limit] == [
        (number, chunk) for number, chunk in kept if len(chunk) <= limit
    ]


# --- garbage

FILES = {
    "a.jsonl": lines_of(ROWS).encode(),
    "a.json": json.dumps(ROWS).encode(),
    "a.txt": b"one\n\ntwo",
    "a.jsonl.gz": gzip.compress(lines_of(ROWS).encode()),
    "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "a.parquet": b"PAR1" + bytes(40) + b"PAR1",
}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(list(FILES)))
def test_damaged_files_end_in_quarantine_or_a_users_error(tmp_path, data, name):
    body = bytearray(FILES[name])
    if data.draw(st.booleans()):
        body = body[: data.draw(st.integers(0, len(body)))]
    for at in data.draw(st.lists(st.integers(0, max(len(body) - 1, 0)), max_size=4)):
        body[at : at + 1] = data.draw(st.binary(max_size=3))
    path = tmp_path / name
    path.write_bytes(body)
    quarantine = Quarantine(None, 50)
    try:
        for row_id, record in read_records(str(path), quarantine, max_row_bytes=200):
            assert row_id.startswith(name) and isinstance(record, dict)
            json.dumps(record, ensure_ascii=False).encode()
    except UserError as error:
        assert name in str(error) or "bad rows" in str(error)


# --- the quarantine


def test_quarantine_stops_once_there_are_too_many(tmp_path):
    path = tmp_path / "bad.jsonl"
    quarantine = Quarantine(path, 2)
    quarantine.add("f:1", RowError("no answer: at the end"), {"text": "ü"})
    quarantine.add("f:2", "no answer: at all", "raw")
    with pytest.raises(UserError) as caught:
        quarantine.add("f:3", "unknown role: x", b"\xff")
    for part in (
        "more than 2 bad rows",
        "2 x no answer, 1 x unknown role",
        "f:1: no answer: at the end",
        "f:3",
        str(path),
    ):
        assert part in str(caught.value)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["f:1", "f:2", "f:3"]
    assert [line["raw"] for line in lines] == ['{"text": "ü"}', "raw", "\\xff"]
    assert lines[0]["reason"] == "no answer: at the end"


def test_quarantine_zero_stops_at_the_first():
    with pytest.raises(UserError, match="more than 0 bad rows"):
        Quarantine(None, 0).add("f:1", "x", "y")


def test_quarantine_file_appears_with_the_first_row_and_is_complete_at_once(tmp_path):
    path = tmp_path / "deep" / "bad.jsonl"
    with Quarantine(path, 9) as quarantine:
        assert not path.exists()
        assert quarantine.summary() == "bad rows: 0"
        quarantine.add("f:1", "x", "\ud800" + "y" * 3000)
        (line,) = path.read_text().splitlines()
        assert len(json.loads(line)["raw"]) == 2000
        quarantine.close()
        quarantine.add("f:2", "x", "z")
    assert len(path.read_text().splitlines()) == 2
    with Quarantine(path, 9) as later:
        later.add("f:7", "x", "z")
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ["f:7"]


def test_quarantine_keeps_the_first_three_reasons_only():
    quarantine = Quarantine(None, 99)
    for number in range(5):
        quarantine.add(f"f:{number}", "x: y", "")
    assert quarantine.summary() == "bad rows: 5 (5 x x)\n  f:0: x: y\n  f:1: x: y\n  f:2: x: y"


def test_quarantine_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the quarantine file"):
        Quarantine(tmp_path / "file" / "bad.jsonl", 9).add("f:1", "x", "y")


# --- tables and data sets


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"u{i}"}], "answer": None} for i in range(150)]
    rows[70]["answer"] = "x" * 5000
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert read(str(path))[0] == named("a.parquet", rows)
    kept, quarantine = read(str(path), max_row_bytes=4000)
    assert [row_id for row_id, _ in kept] == [f"a.parquet:{i}" for i in range(1, 151) if i != 71]
    assert quarantine.counts == {"row too large": 1}
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot read the parquet file .* after row 0"):
        read(str(tmp_path / "b.parquet"))
    parquet.write_table(arrow.Table.from_pylist(rows[:0], schema=arrow.schema([("a", arrow.string())])), path)
    with pytest.raises(UserError, match="holds no rows"):
        read(str(path))


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    table.save_to_disk(str(tmp_path / "one"))
    assert read(str(tmp_path / "one"))[0] == named("one", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="single data set without splits"):
        read(f"{tmp_path / 'one'}:train")
    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    splits.save_to_disk(str(tmp_path / "two"))
    assert len(read(str(tmp_path / "two"))[0]) == 2
    assert read(f"{tmp_path / 'two'}:test")[0] == [("two:test:1", {"text": "b"})]
    with pytest.raises(UserError, match="no split 'tset': it has train, test; .*did you mean 'test'"):
        read(f"{tmp_path / 'two'}:tset")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the saved data set"):
        read(str(tmp_path / "one"))


def test_hub_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        if name == "user/gone":
            raise ConnectionError("no network")
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("user/name:test")[0] == [("name:test:1", {"text": "a"})]
    read("user/name")
    read("user/name/main:train[:10]")
    assert asked == [("user/name", None, "test"), ("user/name", None, "train"), ("user/name", "main", "train[:10]")]
    with pytest.raises(UserError, match="cannot load the hub data set user/gone .split train.: no network"):
        read("user/gone")


@pytest.mark.parametrize(
    "given", ["a.jsonl", "user/name.jsonl", "./user/name", "/abs/name", "a/b/c/d", "user/*.parquet", ""]
)
def test_these_are_no_hub_ids(given):
    assert hub_id(given) is None


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "user/name")])
def test_a_missing_package_names_the_extra(write, monkeypatch, module, source):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    path = write(source, "PAR1") if source.endswith(".parquet") else source
    with pytest.raises(UserError, match=rf"needs the package {module}: pip install 'lit-reason\[hub\]'"):
        read(path)
