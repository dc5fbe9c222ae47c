import math

import pytest
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.core.metrics_log import MetricsLog, parse_metrics
from lit_reason.core.report import Interval, Sample, render_report
from lit_reason.core.run_page import RunFacts, accuracy, run_page
from lit_reason.data.condensation.ledger import Ledger, TurnRecord
from lit_reason.data.token_row import SEGMENT_NAMES


def realistic_log(steps=60):
    """A run whose loss falls by half, with three evaluations."""
    series = {}

    def put(name, step, value):
        series.setdefault(name, []).append((step, value))

    for s in range(steps):
        d = 0.5 + 0.5 * math.exp(-s / 10)
        for kind, scale in (("loss", 2.0), ("entropy", 1.5), ("accuracy", 0.4)):
            put(f"train/{kind}", s, scale * d)
            for i, name in enumerate(SEGMENT_NAMES):
                put(f"train/{kind}_{name}", s, scale * d * (1 - 0.05 * i))
        for decile in (0, 1, 8, 9):
            put(f"train/loss_decile_{decile}", s, d * (1 + decile))
        put("perf/tokens_per_s", s, 5000.0 + s)
        put("perf/trained_tokens_per_s", s, 3000.0 + s)
        put("perf/step_s", s, 0.8)
        put("perf/mfu", s, 0.41)
        put("perf/peak_memory_gb", s, 2.1 if s == 30 else 2.0)
        put("perf/total_tokens", s, 4096.0 * (s + 1))
        put("perf/total_trained_tokens", s, 2048.0 * (s + 1))
        put("perf/total_seconds", s, 0.8 * (s + 1))
        put("lr", s, 1e-4)
    for s, p in ((0, 0.05), (30, 0.4), (60, 0.62)):
        for name, v in (("", p), ("_low", max(0.0, p - 0.1)), ("_high", p + 0.1)):
            put(f"val/pass@1{name}", s, v)
        put("val/pass@10", s, min(1.0, p + 0.2))
        put("val/loss", s, 1.0 if s == 30 else 1.5)
        put("val/closed", s, p)
        put("val/generated_tokens", s, 200.0)
    return MetricsLog(series)


def ledger():
    found = Ledger()
    found.kept((100, 100), [TurnRecord("condensed", (40, 20), (600, 300), (80, 80))])
    found.kept((100, 100), [TurnRecord("shorter than min_tokens", (4, 4), (100, 100), (20, 20))])
    found.dropped("trace never closed")
    found.answers["repaired"] += 1
    return found.to_dict()


FACTS = RunFacts(
    "a run",
    "SFT",
    "tiny, LoRA of rank 4",
    problems=100,
    ledger={
        "rows": 2,
        "bad_rows": {"no assistant turn": 7},
        "dropped": {},
        "condensation": ledger(),
        "notes": ["note"],
    },
    samples=[Sample("q", "a", True), Sample("q", "b", False), Sample("q", "c", None)],
    config="model: {}",
    command="lit-reason fit",
    versions={"torch": "2.13"},
)


@pytest.fixture(scope="module")
def full():
    """The page of a full run, drawn once."""
    return run_page(FACTS, realistic_log())


def sections(report):
    return {section.title: section for section in report.sections if not section.empty}


def titles(section):
    return [figure.title for figure in section.figures]


def test_the_verdict_says_what_was_trained_how_long_and_how_good(full):
    verdict = full.verdict.replace("\u00a0", " ")
    assert verdict == (
        "SFT of tiny, LoRA of rank 4: 60 optimizer steps on 122,880 trained tokens in 48 s. "
        "Training loss went from 1.95 to 1. "
        "Accuracy on held-out problems went from 5 % to 62 % (95 % interval 52 to 72, 100 problems)."
    )


def test_restarts_show_the_ranks_of_the_blocks_in_order():
    series = {f"restart/stable_rank_block_{block}": [(9, 5.0 - block), (19, 1.0)] for block in (2, 0, 10)}
    log = MetricsLog({**series, "restart/stable_rank": [(9, 3.0), (19, 1.0)]})
    page = run_page(RunFacts("r"), log)
    assert titles(sections(page)["Restarts"]) == ["Stable rank", "Stable rank by block"]
    bars = sections(page)["Restarts"].figures[1]
    assert [label for label, *_ in bars.legend] == ["first restart", "last restart"]
    assert "Restarts" not in sections(run_page(FACTS, realistic_log()))


def test_the_verdict_of_little_is_short():
    log = parse_metrics("step,train/loss,val/pass@1\n0,2.5,\n1,,0.5\n")
    verdict = run_page(RunFacts("r"), log).verdict.replace("\u00a0", " ")
    assert verdict == "1 optimizer step. Accuracy on held-out problems is 50 % (95 % interval 50 to 50)."
    assert run_page(RunFacts("r"), MetricsLog()).verdict == "0 optimizer steps."


def test_tiles_hold_the_newest_totals(full):
    tiles = {tile.label: tile for tile in full.tiles}
    values = {label: tile.value.replace("\u00a0", " ") for label, tile in tiles.items()}
    saved = 1 - (300 + 100 + 200 + 80 + 20) / (600 + 100 + 200 + 80 + 20)
    assert values == {
        "Accuracy": "62 %",
        "Validation loss": "1.500",
        "Trained tokens": "122,880",
        "Training time": "48 s",
        "Tokens a second": "5,120",
        "FLOP utilisation": "41 %",
        "Tokens saved": f"{100 * saved:.3g} %",
        "Peak memory": "2.1 GB",
    }
    assert tiles["Accuracy"].interval == Interval(0.62, 0.52, 0.72)
    assert tiles["Validation loss"].note == "lowest 1.000 at step 30"
    assert tiles["Tokens a second"].note == "2,560 trained"


def test_accuracy_takes_the_interval_of_its_own_step():
    log = MetricsLog({"val/pass@1": [(0, 0.1), (9, 0.5)], "val/pass@1_low": [(0, 0.05)], "val/pass@1_high": [(0, 0.2)]})
    assert accuracy(log, 0) == Interval(0.1, 0.05, 0.2)
    assert accuracy(log) == Interval(0.5, 0.5, 0.5)  # no interval was logged there
    assert accuracy(MetricsLog()) is None


def test_plots_of_a_full_run(full):
    shown = sections(full)
    assert titles(shown["Answers to held-out problems"]) == ["Accuracy", "How answers end", "Length of answers"]
    legend = [label for label, *_ in shown["Answers to held-out problems"].figures[0].legend]
    assert legend == ["pass@1", "pass@10"]
    assert titles(shown["Loss"]) == ["Loss", "Entropy of the predictions", "Tokens predicted right"]
    assert [label for label, *_ in shown["Loss"].figures[0].legend] == ["training", "validation"]
    by_segment = shown["Tokens by part of the trace"]
    assert titles(by_segment) == ["Loss by segment", "Entropy by segment", "Tokens right by segment", "At the cut",
                                  "Loss by place in the trace"]  # fmt: skip
    names = [name.replace("_", " ") for name in SEGMENT_NAMES]
    assert [label for label, *_ in by_segment.figures[0].legend] == names
    assert titles(shown["Speed and memory"]) == ["Throughput", "FLOP utilisation", "Peak memory",
                                                 "Time of an optimizer step", "Learning rate"]  # fmt: skip


def test_every_metric_is_in_the_table(full):
    log = realistic_log()
    (table,) = sections(full)["All metrics"].tables
    assert [row[0] for row in table.rows] == list(log.series)
    assert dict((row[0], row[1:]) for row in table.rows)["val/loss"] == ("1.5", "1.5", "1", "1.5", "3")


def test_what_was_done_to_the_data_is_told(full):
    shown = sections(full)["Training data"]
    text = shown.note.replace("\u00a0", " ")
    assert (
        text
        == "2 training rows. 1 traces were condensed: 50 % of their thoughts and 50 % of their tokens were kept. Note."
    )
    tables = {table.columns[0]: [tuple(row) for row in table.rows] for table in shown.tables}
    assert tables["tokens"][1] == ("trace", "700", "400", "57.1\u00a0%")
    assert tables["tokens"][-1] == ("all", "1,000", "700", "70\u00a0%")
    assert ("dropped: trace never closed", "1") in tables["rows by outcome"]
    assert tables["rows that could not be used"] == [("no assistant turn", "7")]
    assert "rows by length" not in tables
    assert titles(shown) == ["Condensation"]


def test_full_traces_draw_no_condensation():
    found = Ledger()
    found.kept((10, 10), [TurnRecord("full", (4, 4), (100, 100), (20, 20))])
    facts = RunFacts("r", ledger={"rows": 1, "condensation": found.to_dict()})
    page = run_page(facts, MetricsLog())
    assert not sections(page)["Training data"].figures
    assert "Tokens saved" not in [tile.label for tile in page.tiles]


def test_samples_are_counted():
    assert sections(run_page(FACTS, MetricsLog()))["What the model writes"].note.startswith("1 of the 2 shown")


def test_failures_and_broken_numbers_are_in_red():
    log = parse_metrics("step,train/loss\n0,1\n7,nan\n")
    page = run_page(RunFacts("r", status="failed", alarm="RuntimeError: boom"), log)
    assert page.alarm == "RuntimeError: boom\ntrain/loss was NaN or infinite, first at step 7"
    assert Page(render_report(page)).having("alarm") == ["p"]


def test_a_full_page_is_sound(full):
    text = render_report(full)
    page = Page(text)
    assert len([t for t, _ in page.tags if t == "svg"]) == 3 + 3 + 5 + 1 + 5
    assert len(text) < 1_000_000


NAMES = st.sampled_from(
    ["train/loss", "val/loss", "val/pass@1", "val/pass@1_low", "val/pass@1_high", "val/pass@2", "train/loss_seam",
     "train/loss_decile_3", "perf/mfu", "perf/total_tokens", "perf/total_seconds", "perf/total_trained_tokens",
     "perf/peak_memory_gb", "lr", "<b>x</b>", "$x^{", "val/pass@", ""]
)  # fmt: skip
VALUES = st.one_of(
    st.just(""), st.floats().map(repr), st.sampled_from(["nan", "inf", "x", "1e29", "-1e29", "0", "1e-320"])
)


@settings(max_examples=15, deadline=None)
@given(st.lists(NAMES, max_size=6, unique=True), st.data())
def test_any_metrics_file_renders(names, data):
    row = st.tuples(st.integers(-2, 10**16).map(str), *[VALUES for _ in names]).map(",".join)
    rows = data.draw(st.lists(row, max_size=6))
    page = Page(render_report(run_page(FACTS, parse_metrics("\n".join([",".join(["step", *names]), *rows])))))
    assert "a run" in page.text


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_render(steps):
    assert Page(render_report(run_page(FACTS, realistic_log(steps))))
