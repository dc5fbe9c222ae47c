"""`lit-reason inspect`: a file and a model, a recipe, the screen, the page, and exit codes that name the row."""

import io
import json
import random
import sys
import tracemalloc

import pytest
from html_page import Page
from tiny_run import TEMPLATE, trace_record, write_model, write_traces

from lit_reason.cli import inspect_text
from lit_reason.cli.door import main as door
from lit_reason.cli.inspect_text import Screen, printable, wants_colour
from lit_reason.core.trainer import ReasonTrainer
from lit_reason.data.inspection.xray import KINDS

RECIPE = """\
vars: {tau: 0.5}
model:
  class_path: SFTRegime
  init_args:
    lm: {path: model}
data:
  class_path: TraceData
  init_args:
    train_file: traces.jsonl
    condense: {strategy: epic, tau: "${vars.tau}", min_tokens: 0, min_chars: 1}
    max_length: 128
trainer:
  max_steps: 3
  callbacks: [{class_path: ModelCheckpoint}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer without weights beside it, and rows."""
    folder = tmp_path_factory.mktemp("xray")
    write_model(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    write_traces(folder / "traces.jsonl", rows=12)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Runs stand in the folder, in a terminal of known width, and never build a trainer."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["lit-reason"])
    monkeypatch.setattr(ReasonTrainer, "__init__", lambda *args, **options: pytest.fail("a trainer was built"))


@pytest.fixture
def inspect(capsys):
    """`inspect(*arguments)`: exit code, standard output, error stream."""

    def run(*arguments):
        capsys.readouterr()
        code = door(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def bad_rows(folder):
    """Rows whose answer is another one: numbers 2 and 5 of six."""
    rng = random.Random(3)
    rows = [trace_record(rng) for _ in range(6)]
    for n in (1, 4):
        rows[n]["answer"] = "19"
        rows[n]["messages"][1]["content"] = "<think> so wait . </think> 3"
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


OPTIONS = ("--strategy", "epic", "--tau", "0.5", "--min-tokens", "0", "--min-chars", "1")


def test_a_file_and_a_model(inspect):
    code, out, err = inspect("traces.jsonl", "--model", "model", *OPTIONS)
    assert (code, err) == (0, "")
    assert [n for n in range(1, 13) if f"\ntraces.jsonl:{n}, " in out] == [1, 2, 3]
    assert "no findings" in out and "rows        12 to train on" in out and "\033" not in out
    for name in ("prompt", "marker", "understanding", "seam", "solution", "end"):
        assert f"  {name} " in out
    row = out.split("\n\n")[0].splitlines()
    assert len({line.index("│") for line in row if "│" in line}) == 1  # one edge, whatever stands left of it
    assert row[2].split()[:3] == ["prompt", row[2].split()[1], "off"]
    assert any(line.split()[0] == "end" and line.split()[2] == "x1" and line.endswith("<end>") for line in row)
    assert "thoughts" in row[-1] and "of" in row[-1]


def test_a_recipe_reads_as_fit_reads_it(inspect, folder):
    given = inspect("traces.jsonl", "--model", "model", *OPTIONS, "--max-length", 128)
    read = inspect("--config", "recipe.yaml")
    assert read == given and read[0] == 0
    (folder / "over.yaml").write_text("vars: {tau: 0.9}\n")
    composed = inspect("--config", "recipe.yaml", "--config=over.yaml")
    assert composed[1] != read[1]
    assert inspect("--config", "recipe.yaml", "--vars.tau", 0.9) == composed
    fewer = inspect("--config", "recipe.yaml", "--data.max_length=20", "--rows", 0)
    assert "over length 12 rows longer than max_length 20" in fewer[1]


def test_a_file_beside_a_recipe_and_its_splits(inspect, folder):
    name = bad_rows(folder)
    code, out, err = inspect(name, "--config", "recipe.yaml")
    assert code == 2 and "bad.jsonl:2" in err
    code, out, _ = inspect(name, "--config", "recipe.yaml", "--split", "test")
    assert code == 2 and "summary of bad.jsonl" in out
    code, _, err = inspect("--config", "recipe.yaml", "--split", "val")
    assert code == 2 and "data.val_file is missing" in err


def test_bad_rows_are_named(inspect, folder):
    code, out, err = inspect(bad_rows(folder), "--model", "model", "--rows", 1)
    assert code == 2
    assert err.startswith("lit-reason: rows: 2 with findings, such as bad.jsonl:2: the answer does not follow")
    assert "findings in 2 of 6 records" in out and "bad.jsonl:5: the reference is '19'" in out
    assert [n for n in range(1, 7) if f"bad.jsonl:{n}, " in out] == [1, 2]


WRITTEN = "m.content"
GENERATION = "{{ '<assistant> ' }}"
TEMPLATES = {  # defect: what of the sound template is written otherwise
    "think_doubled": (WRITTEN, "'<think> wait </think> ' + m.content"),
    "think_emptied": (WRITTEN, "('<think> </think>' + m.content.split('</think>')[-1])"),
    "think_dropped": (WRITTEN, "m.content.split('</think>')[-1]"),
    "end_untrained": ("' <end> '", "' . '"),
    "prompt_differs": (GENERATION, "{{ '<assistant> the ' }}"),
}


@pytest.mark.parametrize("defect", TEMPLATES)
def test_each_defect_of_a_template_ends_with_2_and_names_the_row(inspect, folder, defect):
    old, new = TEMPLATES[defect]
    assert old in TEMPLATE
    (folder / f"{defect}.jinja").write_text(TEMPLATE.replace(old, new))
    code, out, err = inspect("traces.jsonl", "--model", "model", "--chat-template", f"{defect}.jinja")
    assert code == 2 and f"traces.jsonl:1: {KINDS[defect]}" in err
    assert f"12 x {KINDS[defect]}" in out
    recipe = ("--config", "recipe.yaml", "--model.lm.chat_template", f"{defect}.jinja", "--rows", 0)
    code, _, err = inspect(*recipe)
    assert code == 2 and f"traces.jsonl:1: {KINDS[defect]}" in err


ROWS = {  # defect: number of the row at fault, and options
    "empty_mask": (3, ()),
    "end_untrained": (1, ("--data.render.weights.end", 0)),
    "answer_lost": (5, ()),
}


@pytest.mark.parametrize("defect", ROWS)
def test_each_defect_of_a_row_ends_with_2_and_names_it(inspect, folder, defect):
    number, options = ROWS[defect]
    rng = random.Random(4)
    rows = [trace_record(rng) for _ in range(6)]
    if defect == "empty_mask":
        rows[2]["messages"][1]["weight"] = 0
    if defect == "answer_lost":
        rows[4]["answer"] = "19"
    (folder / f"{defect}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = inspect(f"{defect}.jsonl", "--config", "recipe.yaml", *options)
    assert code == 2 and f"{defect}.jsonl:{number}: {KINDS[defect]}" in err
    assert f"{6 if options else 1} x {KINDS[defect]}" in out


def test_a_template_with_a_defect(inspect, folder):
    (folder / "drops.jinja").write_text(TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]"))
    code, out, err = inspect("traces.jsonl", "--model", "model", "--chat-template", "drops.jinja")
    assert code == 2 and "traces.jsonl:1: the think block is dropped" in err and "not one row is left" in err
    assert "as the template writes it" in out and "12 x the think block is dropped" in out and "and 7 more" in out
    assert (
        inspect("traces.jsonl", "--model", "model", "--chat-template", "drops.jinja", "--turn-text", "verbatim")[0] == 0
    )


def test_rows_that_a_run_would_not_bear(inspect, folder):
    good = (folder / "traces.jsonl").read_text()
    (folder / "broken.jsonl").write_text(good + "{\n{\n")
    code, out, _ = inspect("broken.jsonl", "--model", "model")
    assert code == 0 and "bad rows: 2 (2 x not JSON)" in out and "broken.jsonl:13: not JSON" in out
    code, _, err = inspect("broken.jsonl", "--model", "model", "--max-bad-rows", 1)
    assert code == 2 and "2 unusable, a run bears 1" in err


@pytest.mark.parametrize("name", ["7", "traces.jsonl:7"])
def test_a_row_by_name(inspect, name):
    code, out, _ = inspect("traces.jsonl", "--model", "model", "--row", name)
    assert code == 0 and [n for n in range(1, 13) if f"traces.jsonl:{n}, " in out] == [7]


def test_long_spans_are_cut_unless_asked_for(inspect, folder):
    words = "so wait the answer is " * 100
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": words}]
    (folder / "long.jsonl").write_text(json.dumps({"messages": messages}))
    assert "characters left out]" in inspect("long.jsonl", "--model", "model")[1]
    whole = inspect("long.jsonl", "--model", "model", "--full")[1]
    assert "left out]" not in whole
    assert "".join(line.partition("│ ")[2] for line in whole.splitlines()).count("answer") == 100
    assert max(len(line) for line in whole.splitlines() if "│" in line) == 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("traces.jsonl",), "--model"),
        (("--model", "model"), "FILE"),
        (("traces.jsonl", "--model", "nowhere/x"), "nowhere"),
        (("absent.jsonl", "--model", "model"), "no such file: absent.jsonl"),
        (("traces.jsonl", "--model", "model", "--row-s", "1"), "did you mean '--rows'"),
        (("traces.jsonl", "--model", "model", "--strategy", "epik"), "epic"),
        (("traces.jsonl", "--model", "model", "--html", "no/where.html"), "there is no folder no"),
        (("--config", "recipe.yaml", "--data.condense.tua", "1"), "tau"),
        (("--config", "recipee.yaml"), "recipee.yaml"),
        (("--config", "recipe.yaml", "--data", "LightningDataModule"), "TraceData"),
    ],
)
def test_refusals(inspect, arguments, message):
    code, out, err = inspect(*arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_help(inspect):
    code, out, _ = inspect("--help")
    assert code == 0 and "--config RECIPE" in out and "--tau" in out and "Exit code" in out


# --- screen


class Terminal(io.StringIO):
    def __init__(self, tty=True, encoding="utf-8"):
        super().__init__()
        self.tty, self.code = tty, encoding

    def isatty(self):
        return self.tty

    encoding = property(lambda self: self.code)


@pytest.mark.parametrize(
    ("tty", "settings", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_only_where_it_is_wanted(monkeypatch, tty, settings, colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(Terminal(tty)) is colour


def test_colours_only_repeat_the_words(inspect, monkeypatch):
    plain = inspect("traces.jsonl", "--model", "model")[1]
    monkeypatch.setattr(inspect_text, "wants_colour", lambda out: True)
    painted = inspect("traces.jsonl", "--model", "model")[1]
    assert "\033[" in painted and painted.count("\033[0m") * 2 == painted.count("\033[")
    bare = painted
    for code in {*inspect_text.COLOURS.values(), "0", "1", "2", "31", "32", "33"}:
        bare = bare.replace(f"\033[{code}m", "")
    assert bare == plain


def test_nothing_from_the_data_reaches_the_terminal_as_a_command():
    assert printable("a\033[31m\x07\u202eb é✓\t") == "a\\x1b[31m\\x07\\u202eb é✓\\t"


def test_a_terminal_without_unicode():
    screen = Screen(None, out=Terminal(False, "ascii"))
    lines = list(screen._lines("one\n\ntwo é"))
    screen._print("\n".join([*lines, screen.mark_edge, screen.mark_bad]))
    assert screen.out.getvalue() == "one\\n\\n\ntwo \\xe9\n|\n!\n"


# --- page


def test_the_page(inspect, folder):
    name = bad_rows(folder)
    code, out, _ = inspect(name, "--model", "model", *OPTIONS, "--html", "page.html")
    assert code == 2 and out.endswith("page  page.html\n")
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    assert len(page.having("passage")) == 4  # the first three rows, one of them bad, and the other bad one
    assert page.having("piece") and page.having("strip")
    for text in ("X-ray", "bad.jsonl:5", "the reference is '19'", "Tokens by segment", "Rows by length", "no loss"):
        assert text in page.text
    assert inspect("traces.jsonl", "--model", "model", "--html", "page.html")[0] == 0
    assert "No findings in 12 records" in (folder / "page.html").read_text(encoding="utf-8")


def test_the_page_holds_text_from_the_data_as_text(inspect, folder):
    evil = "</b><script>alert(1)</script>\033"
    messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    call = [{"type": "function", "function": {"name": evil, "arguments": "{}"}}]
    calling = [messages[0], {"role": "assistant", "content": "", "tool_calls": call}]
    rows = [{"messages": messages}, {"messages": calling}]
    (folder / evil_name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect(evil_name, "--model", "model", "--html", "evil.html")[0] == 2
    Page((folder / "evil.html").read_text(encoding="utf-8"))


evil_name = "<i>&.jsonl"


def test_memory_does_not_grow_with_the_file(inspect, folder):
    def peak(rows):
        write_traces(folder / "many.jsonl", rows=rows)
        tracemalloc.start()
        assert inspect("many.jsonl", "--model", "model", "--rows", 1)[0] == 0
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(20)
    assert peak(400) < peak(100) + 300_000
