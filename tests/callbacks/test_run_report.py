import os
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from html_page import Page
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lit_reason.callbacks import run_report
from lit_reason.callbacks.run_report import RunReport, choose_samples, metrics_file, model_name
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.evaluation import EvalRecord, EvalResult
from lit_reason.models.config import AdapterConfig, ModelConfig


def record(number, correct, **fields):
    values = dict(
        row_id=f"row {number}", sample=0, prompt="2 + 2?", completion="<think>hm</think> 4", answer="4",
        correct=correct, reason="" if correct else "answer differs", error="", tokens=9, ended=True,
        trace="closed", repeats=False,
    )  # fmt: skip
    return EvalRecord(**values | fields)


class Judged(VerifiedGeneration):
    """Stands for generation: two answers after each validation."""

    def setup(self, trainer, pl_module, stage):
        pass

    def on_validation_epoch_end(self, trainer, pl_module):
        self.last = EvalResult((record(0, True), record(1, False, completion="<script>5</script>")), 1)
        self.history.append({"step": trainer.global_step, "prompts": 2, "seconds": 0.1})
        pl_module.log_dict(self.last.metrics("val/"))

    def on_train_end(self, trainer, pl_module):
        pass


class ToyRegime(L.LightningModule):
    def __init__(self, fail_at=None, error=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.fail_at, self.error = fail_at, error or RuntimeError("no <b>room</b>")

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise self.error
        loss = (self.w * batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.w.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, *callbacks, module=None, epochs=2):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        callbacks=[Judged(), *callbacks],
        logger=CSVLogger(tmp_path, name="toy", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(torch.ones(4, 1), batch_size=1)
    trainer.fit(module or ToyRegime(), loader, DataLoader(torch.ones(1, 1)))


def page_of(tmp_path):
    folder = tmp_path / "toy" / "version_0"
    assert not (folder / "report.html.part").exists()
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_leaves_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-reason", "fit", "--x", "a b"])
    monkeypatch.setattr("lit_reason.kernels.dispatch._used", {"linear_token_loss": {"torch"}})
    folder = tmp_path / "toy" / "version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("lr: 0.1 # <tau>")
    fit(tmp_path, RunReport())
    page = page_of(tmp_path)
    assert page.having("finished") == ["span"]
    expected = (
        "toy",
        "8 optimizer steps",
        "lr: 0.1 # <tau>",
        "lit-reason fit --x 'a b'",
        torch.__version__,
        "<script>5</script>",
        "expected 4 · answer differs · 9 tokens",
        "50\u00a0%",
        "2 problems",
        "linear_token_loss in torch",
    )
    assert [words for words in expected if words not in page.text] == []
    assert page.having("right") and page.having("wrong")
    assert len([t for t, _ in page.tags if t == "svg"]) == 4  # accuracy, ends, length, loss


def test_a_failed_run_says_so_and_keeps_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="room"):
        fit(tmp_path, RunReport(title="mine"), module=ToyRegime(fail_at=3))
    page = page_of(tmp_path)
    assert page.having("failed") == ["span"]
    assert "RuntimeError: no <b>room</b>" in page.text and "mine" in page.text and "3 optimizer steps" in page.text


def test_an_interrupted_run_is_stopped_not_failed(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, RunReport(), module=ToyRegime(fail_at=2, error=KeyboardInterrupt()))
    page = page_of(tmp_path)
    assert page.having("stopped") == ["span"] and not page.having("alarm")


def test_validation_renews_the_page_only_when_that_is_cheap(tmp_path, monkeypatch):
    written = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_report.time, "perf_counter", lambda: clock.now)

    def write(facts, folder, metrics):
        written.append((facts.status, clock.now))
        clock.now += 1.0  # drawing takes a second
        return folder / "report.html"

    monkeypatch.setattr(run_report, "write_report", write)

    class Pass(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            clock.now += 20.0

    fit(tmp_path, Pass(), RunReport(), epochs=8)
    assert [status for status, _ in written] == ["running"] * 3 + ["finished"]
    times = [at for status, at in written if status == "running"]
    assert all(later - earlier >= 50 for earlier, later in zip(times, times[1:], strict=False))


def test_a_page_that_cannot_be_drawn_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError("plot")

    monkeypatch.setattr(run_report, "write_report", broken)
    fit(tmp_path, RunReport())
    assert "report.html could not be written" in caplog.text and "ZeroDivisionError: plot" in caplog.text


def test_nothing_is_written_before_a_run_has_a_folder(tmp_path):
    RunReport().on_exception(SimpleNamespace(is_global_zero=True), None, RuntimeError("bad file"))
    assert os.listdir(tmp_path) == []


def test_metrics_are_those_of_the_csv_logger_wherever_it_stands(tmp_path):
    first = TensorBoardLogger(tmp_path, name="board")
    second = CSVLogger(tmp_path, name="csv", version=3)
    second.log_metrics({"a": 1.0}, step=0)
    found = metrics_file(SimpleNamespace(loggers=[first, second]), tmp_path)
    assert found == tmp_path / "csv" / "version_3" / "metrics.csv" and found.exists()
    assert metrics_file(SimpleNamespace(loggers=[first]), tmp_path) == tmp_path / "metrics.csv"


def test_samples_take_turns_and_tell_what_was_expected():
    records = [record(i, i in (1, 2)) for i in range(6)]
    samples = choose_samples(records, 5)
    assert [s.title for s in samples] == ["row 0", "row 1", "row 3", "row 2", "row 4"]
    assert [s.right for s in samples] == [False, True, False, True, False]
    assert samples[1].note == "expected 4 · 9 tokens"
    assert choose_samples([record(0, False, reason="wrong")], 1)[0].note == "expected 4 · 9 tokens"  # the sign says it
    unchecked = choose_samples([record(0, False, error="ValueError: x", answer=None, reason="")], 5)[0]
    assert unchecked.right is None and unchecked.note == "ValueError: x · 9 tokens"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, ""),
        (ModelConfig(path="/models/SmolLM2-135M/"), "SmolLM2-135M"),
        (ModelConfig(path="a/b", adapter=AdapterConfig(rank=8)), "b, LoRA of rank 8"),
        (ModelConfig(path="a/b.gguf", adapter=AdapterConfig(quantize="nf4")), "b.gguf, QLoRA (nf4) of rank 16"),
        (ModelConfig(config={"model_type": "llama"}), "llama from scratch"),
    ],
)
def test_model_names(config, name):
    assert model_name(config) == name
