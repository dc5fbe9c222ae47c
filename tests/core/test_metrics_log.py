import math

from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from lit_reason.core.metrics_log import LARGEST, parse_metrics, read_metrics


def test_what_the_logger_writes_comes_back(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 2.5, "epoch": 0}, step=0)
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.save()
    logger.log_metrics({"val/loss": 2.0}, step=1)  # a new column: the file is written anew
    logger.save()
    log = read_metrics(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")
    assert log.series == {"train/loss": [(0, 2.5), (1, 1.5)], "val/loss": [(1, 2.0)]}
    assert log.last("train/loss") == 1.5 and log.highest("train/loss") == 2.5
    assert log.last("nothing") is None and log.highest("nothing") is None and log.points("nothing") == []


def test_a_missing_file_is_an_empty_log(tmp_path):
    log = read_metrics(tmp_path / "metrics.csv")
    assert (log.series, log.broken, log.steps) == ({}, {}, 0)


def test_a_resumed_run_replaces_the_steps_it_took_again():
    log = parse_metrics("step,train/loss\n0,3\n1,2\n2,9\n1,2.5\n2,1\n")
    assert log.points("train/loss") == [(0, 3.0), (1, 2.5), (2, 1.0)]


def test_steps_are_those_of_training_not_of_evaluation():
    assert parse_metrics("step,train/loss,val/pass@1\n9,1,\n10,,0.5\n").steps == 10
    assert parse_metrics("step,val/pass@1\n0,0.5\n").steps == 0


def test_nan_and_infinity_are_kept_apart_with_their_first_step():
    log = parse_metrics("step,train/loss\n0,1\n4,nan\n5,inf\n6,2\n")
    assert log.points("train/loss") == [(0, 1.0), (6, 2.0)]
    assert log.broken == {"train/loss": 4}


def test_half_lines_words_and_foreign_columns_are_passed_over():
    log = parse_metrics("step,epoch,a,b\n1,0,5,oops\n2,0,6\n3,0,7,8,9,10\nx,0,1,1\n-4,0,1,1\n")
    assert log.series == {"a": [(1, 5.0), (2, 6.0), (3, 7.0)], "b": [(3, 8.0)]}


def test_without_a_step_column_rows_are_steps():
    assert parse_metrics("a\n5\n6\n").points("a") == [(0, 5.0), (1, 6.0)]


cells = st.one_of(
    st.text(max_size=6), st.floats().map(str), st.integers(-3, 40).map(str), st.sampled_from(["", '"', "nan"])
)


@given(st.lists(st.lists(cells, max_size=5).map(",".join), max_size=8).map("\n".join) | st.text())
def test_any_text_gives_sorted_finite_series(text):
    log = parse_metrics("step," + text)
    for points in log.series.values():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)) and steps[0] >= 0
        assert all(math.isfinite(v) and abs(v) < LARGEST for _, v in points)
