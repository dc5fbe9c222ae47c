"""Runs that are killed and resumed end as runs that were left alone: every loss, every figure, every weight."""

import os
import random
import signal
from pathlib import Path

import pytest
from killing import losses, metrics, start
from tiny_run import write_model, write_traces

DROPOUT = {"model__lm__overrides": '{"attention_dropout": 0.2}'}
COMMON = {"data__holdout": 6, "trainer__max_epochs": 2}
KINDS = {
    "full": COMMON | DROPOUT | {"data__batch_rows": 4, "trainer__accumulate_grad_batches": 2},
    "lora": COMMON
    | {"data__batch_rows": 4, "trainer__accumulate_grad_batches": 3, "trainer__log_every_n_steps": 3}
    | {"model__lm__adapter__rank": 4, "model__lm__adapter__dropout": 0.2},
    "packed": COMMON
    | DROPOUT
    | {"data__batch_rows": None, "data__batch_tokens": 160, "trainer__accumulate_grad_batches": 2}
    | {"trainer__val_check_interval": 3, "trainer__log_every_n_steps": 2},
    "steps": COMMON | DROPOUT | {"data__batch_rows": 8, "trainer__max_epochs": None, "trainer__max_steps": 12},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("survival")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    return base


@pytest.fixture(scope="module")
def whole(folder):
    """By kind: folder and moments of a run that nobody disturbed, without loading processes."""
    done = {}

    def get(kind: str) -> tuple[Path, list[str]]:
        if kind not in done:
            run = folder / f"whole-{kind}"
            assert start(folder, run, KINDS[kind]) == 0, (run / "output.txt").read_text()
            assert all(len(values) == 1 for values in losses(run).values())
            done[kind] = run, (run / "moments.txt").read_text().splitlines()
        return done[kind]

    return get


def assert_survives(
    folder, whole, run: Path, kind: str, at: int, send: int = signal.SIGKILL, workers: int = 0, between=lambda: None
) -> str:
    """Kill a run at a moment, resume it, compare everything; what the resumed run said."""
    reference, _ = whole(kind)
    settings = KINDS[kind] | {"data__workers": workers}
    code = start(folder, run, settings, at=at, send=send)
    assert code == (143 if send == signal.SIGTERM else -send), (run / "output.txt").read_text()
    between()
    assert start(folder, run, settings) == 0, (run / "output.txt").read_text()
    # Steps after the last checkpoint were made twice: a set of one value says that both times gave the same.
    assert losses(run) == losses(reference)
    assert metrics(run) == metrics(reference)
    return (run / "output.txt").read_text()


def moment(moments: list[str], name: str, count: int) -> int:
    """Number of the count-th moment of a name."""
    return [i for i, found in enumerate(moments, 1) if found == name][count - 1]


def test_a_run_killed_while_a_checkpoint_is_written_goes_on(folder, whole, tmp_path):
    writes = moment(whole("full")[1], "checkpoint being written", 14)  # parts of four: within the fourth file
    said = assert_survives(folder, whole, tmp_path, "full", writes)
    assert "going on from" in said and "passed over" not in said
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.parametrize("name, count", [("after on_after_backward", 7), ("after on_validation_batch_start", 1)])
def test_sigterm_saves_the_last_step_and_exits_143(folder, whole, tmp_path, name, count):
    """Between two of the accumulated micro-batches, and in a validation."""
    said = assert_survives(folder, whole, tmp_path, "full", moment(whole("full")[1], name, count), signal.SIGTERM)
    step = {7: 3, 1: 5}[count]
    assert "stopped by SIGTERM" in said and f"step {step}, in" in said


def test_a_run_killed_while_the_token_cache_is_written_starts_afresh(folder, whole, tmp_path):
    at = moment(whole("full")[1], "token cache being written", 20)
    assert "starting afresh" in assert_survives(folder, whole, tmp_path, "full", at)


def test_a_broken_checkpoint_is_named_and_an_older_one_taken(folder, whole, tmp_path):
    """Killed at the end of an epoch; the newest checkpoint has lost its end. Two loading processes."""

    def cut():
        newest = max(tmp_path.glob("**/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:-300])
        broken.append(newest.name)

    broken: list[str] = []
    at = moment(whole("full")[1], "before on_train_epoch_end", 2)
    said = assert_survives(folder, whole, tmp_path, "full", at, workers=2, between=cut)
    assert f"{broken[0]}: broken" in said and "passed over" in said and "going on from" in said


def test_a_disk_that_is_full_stops_the_run_and_a_larger_one_lets_it_go_on(folder, whole, small_disk):
    disk, grow = small_disk
    reference, _ = whole("full")
    assert start(folder, disk / "run", KINDS["full"]) == 1
    said = (disk / "run" / "output.txt").read_text()
    assert "No space left on device; the checkpoint was not written" in said and "Traceback" not in said
    grow()
    assert start(folder, disk / "run", KINDS["full"]) == 0, (disk / "run" / "output.txt").read_text()
    assert "going on from" in (disk / "run" / "output.txt").read_text()
    assert losses(disk / "run") == losses(reference) and metrics(disk / "run") == metrics(reference)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["full", "lora", "packed"])
@pytest.mark.parametrize("name, count", [("after on_after_backward", 9), ("after on_train_epoch_end", 1)])
def test_within_an_epoch_and_at_its_end(folder, whole, tmp_path, kind, workers, name, count):
    assert_survives(folder, whole, tmp_path, kind, moment(whole(kind)[1], name, count), workers=workers)


@pytest.mark.parametrize("step", [pytest.param(n, marks=() if n == 6 else pytest.mark.slow) for n in range(1, 13)])
def test_every_step(folder, whole, tmp_path, step):
    """After the weights of a step were updated, before anything is saved. The sixth is the first of an epoch."""
    assert whole("steps")[1].count("before on_train_batch_end") == 12
    assert_survives(folder, whole, tmp_path, "steps", moment(whole("steps")[1], "before on_train_batch_end", step))


@pytest.mark.slow
def test_25_random_moments(folder, whole, tmp_path):
    seed = int(os.environ.get("SURVIVAL_SEED", "0"))
    rng = random.Random(seed)
    for trial in range(25):
        kind, workers = list(KINDS)[trial % len(KINDS)], rng.choice([0, 2])
        moments = whole(kind)[1]
        at = rng.randrange(1, len(moments) + 1)
        where = f"{kind}, {workers} workers, moment {at} of {len(moments)}: {moments[at - 1]}"
        print(f"seed {seed} trial {trial}: {where}", flush=True)
        said = assert_survives(folder, whole, tmp_path / str(trial), kind, at, workers=workers)
        print("   ", said[said.rindex("resume:") :].partition("\n")[0], flush=True)


@pytest.mark.slow
def test_killed_again_and_again(folder, whole, tmp_path):
    """Each life ends after 300 more moments; all of them together are one run."""
    reference, _ = whole("packed")
    rng, lives = random.Random(1), 1
    settings = KINDS["packed"] | {"data__workers": 2}
    while start(folder, tmp_path, settings, at=rng.randrange(200, 400)) != 0:
        lives += 1
        assert lives < 30
    print(f"{lives} lives")
    assert lives > 2
    assert losses(tmp_path) == losses(reference)
    assert metrics(tmp_path) == metrics(reference)
