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
    | {"model__lm__adapter__rank": 4, "model__lm__adapter__dropout": 0.2, "data__workers": 2},
    "packed": COMMON
    | DROPOUT
    | {"data__batch_rows": None, "data__batch_tokens": 160, "trainer__accumulate_grad_batches": 2}
    | {"trainer__val_check_interval": 3, "trainer__log_every_n_steps": 2, "data__workers": 2},
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
    """By kind: folder and moments of a run that nobody disturbed."""
    done = {}

    def get(kind: str) -> tuple[Path, list[str]]:
        if kind not in done:
            run = folder / f"whole-{kind}"
            assert start(folder, run, KINDS[kind]) == 0, (run / "output.txt").read_text()
            assert all(len(values) == 1 for values in losses(run).values())
            done[kind] = run, (run / "moments.txt").read_text().splitlines()
        return done[kind]

    return get


def assert_survives(folder, whole, run: Path, kind: str, at: int, send: int = signal.SIGKILL) -> str:
    """Kill a run at a moment, resume it, compare everything; what the resumed run said."""
    reference, _ = whole(kind)
    code = start(folder, run, KINDS[kind], at=at, send=send)
    assert code == (143 if send == signal.SIGTERM else -send), (run / "output.txt").read_text()
    assert start(folder, run, KINDS[kind]) == 0, (run / "output.txt").read_text()
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


@pytest.mark.slow
def test_25_random_moments(folder, whole, tmp_path):
    seed = int(os.environ.get("SURVIVAL_SEED", "0"))
    rng = random.Random(seed)
    for trial in range(25):
        kind = list(KINDS)[trial % len(KINDS)]
        moments = whole(kind)[1]
        at = rng.randrange(1, len(moments) + 1)
        print(f"seed {seed} trial {trial}: {kind}, moment {at} of {len(moments)}: {moments[at - 1]}", flush=True)
        said = assert_survives(folder, whole, tmp_path / str(trial), kind, at)
        print("   ", said[said.rindex("resume:") :].partition("\n")[0], flush=True)


@pytest.mark.slow
def test_killed_again_and_again(folder, whole, tmp_path):
    """Each life ends after 300 more moments; all of them together are one run."""
    reference, _ = whole("packed")
    rng, lives = random.Random(1), 1
    while start(folder, tmp_path, KINDS["packed"], at=rng.randrange(200, 400)) != 0:
        lives += 1
        assert lives < 30
    print(f"{lives} lives")
    assert lives > 2
    assert losses(tmp_path) == losses(reference)
    assert metrics(tmp_path) == metrics(reference)
