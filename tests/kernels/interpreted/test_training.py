"""Supervised fine-tuning with Triton's row passes has the loss curve that it has with torch's."""

from pathlib import Path

import pytest
import torch
from tiny_run import fit, write_model, write_traces

from lit_reason.core.metrics_log import read_metrics
from lit_reason.kernels import dispatch


def losses(folder, backend, steps, monkeypatch):
    monkeypatch.setenv("LIT_REASON_KERNELS", backend)
    monkeypatch.setattr(dispatch, "_used", {})
    run = folder / f"{backend}-{steps}"
    cli = fit(folder, run, data__batch_rows=1, data__max_length=64, model__optim__lr=1e-3, trainer__max_steps=steps)
    assert set(dispatch.backends_used().values()) == {backend}
    return torch.tensor(
        [value for _, value in read_metrics(Path(cli.trainer.log_dir) / "metrics.csv").points("train/loss")]
    )


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_loss_curves_agree(steps, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    write_traces(tmp_path / "traces.jsonl")
    of_torch, of_triton = (losses(tmp_path, backend, steps, monkeypatch) for backend in ("torch", "triton"))
    assert len(of_torch) == len(of_triton) == steps
    assert of_torch[-5:].mean() < of_torch[:3].mean()
    torch.testing.assert_close(of_triton, of_torch, rtol=1e-4, atol=1e-4)
