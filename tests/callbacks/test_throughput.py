import csv
import math
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_reason.callbacks import throughput
from lit_reason.callbacks.throughput import Throughput, Totals
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.errors import UserError
from lit_reason.metrics.flops import model_flops


def tiny_llama():
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
    )
    return LlamaForCausalLM(config)


class Packs(torch.utils.data.Dataset):
    """Pack k has documents of k + 1 and 3 tokens and k trained ones."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return SimpleNamespace(ids=torch.zeros(k + 4, dtype=torch.long), index=torch.zeros(k), lengths=(k + 1, 3))


class Clock:
    """Stands still but for the seconds that a test spends on it, or lets the processor work."""

    now = 1000.0
    worked = 10.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.worked


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Toy(L.LightningModule):
    """Spends `step_s` a training step and `val_s` a validation step on a clock."""

    def __init__(self, clock=None, step_s=0.0, val_s=0.0):
        super().__init__()
        self.lm = SimpleNamespace(hf=tiny_llama())
        self.w = torch.nn.Parameter(torch.ones(1))
        self.clock, self.step_s, self.val_s = clock or Clock(), step_s, val_s

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        self.clock.now += self.step_s
        return (self.w**2).sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += self.val_s

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path, *callbacks, module=None, packs=6, val=0, name="run", **kwargs):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=kwargs.pop("log_every_n_steps", 2),
        callbacks=list(callbacks),
        logger=CSVLogger(tmp_path, name=name, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **kwargs,
    )
    packs = Packs(packs) if isinstance(packs, int) else packs
    loader = DataLoader(packs, batch_size=None)
    trainer.fit(module or Toy(), loader, DataLoader(Packs(val), batch_size=None) if val else None)
    with open(tmp_path / name / "version_0" / "metrics.csv") as file:
        return trainer, [row for row in csv.DictReader(file) if row["perf/tokens_per_s"]]


def test_counts_and_rows_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 1e9)
    callback = Throughput()
    trainer, rows = run(tmp_path, callback, packs=5)
    assert [int(r["step"]) for r in rows] == [1, 3, 4]  # two windows, and what was left over
    assert [float(r["perf/total_tokens"]) for r in rows] == [4 + 5, 4 + 5 + 6 + 7, 4 + 5 + 6 + 7 + 8]
    assert float(rows[-1]["perf/total_trained_tokens"]) == 0 + 1 + 2 + 3 + 4
    totals, flops = callback.totals, model_flops(tiny_llama())
    assert (totals.steps, totals.tokens, totals.trained_tokens) == (5, 30, 10)
    assert totals.flops == sum(flops.step((k + 1, 3), k) for k in range(5))
    last, before = rows[-1], float(rows[-2]["perf/total_seconds"])
    seconds = float(last["perf/total_seconds"]) - before
    assert math.isclose(float(last["perf/tokens_per_s"]), 8 / seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/trained_tokens_per_s"]), 4 / seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/step_s"]), seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/mfu"]), flops.step((5, 3), 4) / seconds / 1e9, rel_tol=1e-4)
    assert 0.01 < float(last["perf/peak_memory_gb"]) < 100


def test_accumulated_micro_batches_are_one_step(tmp_path):
    callback = Throughput()
    _, rows = run(tmp_path, callback, packs=6, accumulate_grad_batches=3, log_every_n_steps=1)
    assert callback.totals.steps == 2
    assert [float(r["perf/total_tokens"]) for r in rows] == [4 + 5 + 6, 4 + 5 + 6 + 7 + 8 + 9]


def test_validation_is_not_training_time(tmp_path, clock):
    callback = Throughput()
    run(tmp_path, callback, module=Toy(clock, step_s=0.5, val_s=8.0), packs=4, val=2, val_check_interval=2)
    assert callback.totals.seconds == 4 * 0.5


@pytest.mark.parametrize("generator_first", [False, True])
def test_generation_between_steps_is_not_training_time(tmp_path, clock, generator_first):
    class Slow(VerifiedGeneration):
        """Stands for eight seconds of generation after every step."""

        def setup(self, trainer, pl_module, stage):
            pass

        def on_train_batch_end(self, trainer, pl_module, *rest):
            clock.now += 8.0
            self.last = object()
            self.history.append({"seconds": 8.0, "cpu_seconds": 0.0})
            for listener in self.listeners:
                listener(trainer, trainer.global_step, self.last)

    callback, slow = Throughput(), Slow(at_end=False)
    order = [slow, callback] if generator_first else [callback, slow]
    run(tmp_path, *order, module=Toy(clock, step_s=0.5), packs=3)
    assert callback.totals.seconds == 3 * 0.5


def test_loading_between_steps_is_training_time(tmp_path, clock):
    class Slow(Packs):
        def __getitem__(self, k):
            clock.now += 2.0
            return super().__getitem__(k)

    callback = Throughput()
    run(tmp_path, callback, module=Toy(clock, step_s=0.5), packs=Slow(5))
    assert callback.totals.seconds == 5 * 0.5 + 4 * 2.0  # the first pack is there before the first step


def test_writing_a_checkpoint_is_not_training_time(tmp_path, clock):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_save_checkpoint(self, *rest):
            clock.now += 8.0

    callback = Throughput()
    run(tmp_path, callback, Saves(), module=Toy(clock, step_s=0.5), packs=5)
    assert callback.totals.seconds == 5 * 0.5


def test_cpu_seconds_are_those_of_the_steps(tmp_path, clock):
    class Busy(VerifiedGeneration):
        """Stands for generation that works on four processors for two seconds after every step."""

        def setup(self, trainer, pl_module, stage):
            pass

        def on_train_batch_end(self, trainer, pl_module, *rest):
            clock.now += 2.0
            clock.worked += 8.0
            self.last = object()
            self.history.append({"seconds": 2.0, "cpu_seconds": 8.0})
            for listener in self.listeners:
                listener(trainer, trainer.global_step, self.last)

    class Steps(Toy):
        def training_step(self, batch, batch_idx):
            clock.worked += 0.25
            return super().training_step(batch, batch_idx)

    callback = Throughput()
    _, rows = run(tmp_path, callback, Busy(at_end=False), module=Steps(clock, step_s=0.5), packs=3)
    totals = callback.totals
    assert (totals.seconds, totals.cpu_seconds) == (1.5, 0.75)
    assert float(rows[-1]["perf/total_cpu_seconds"]) == 0.75
    older = {name: value for name, value in vars(totals).items() if name != "cpu_seconds"}
    assert Totals(**older).cpu_seconds == 0  # the state of an older checkpoint


def test_totals_continue_after_a_resume(tmp_path):
    first = Throughput()
    trainer, _ = run(tmp_path, first, packs=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Throughput"]
    second = Throughput()
    second.load_state_dict(state)
    assert second.totals == first.totals
    run(tmp_path, second, packs=2, name="again")
    assert second.totals.tokens == first.totals.tokens + 9
    assert second.totals.steps == 6
    assert second.totals.seconds > first.totals.seconds


def test_tokens_of_all_ranks_add_up_and_tensor_parallel_copies_do_not(monkeypatch):
    other = Totals(steps=3, tokens=70, trained_tokens=10, seconds=9.0, flops=2.0)
    monkeypatch.setattr(throughput, "from_all_ranks", lambda value: [value, other])
    callback = Throughput()
    callback._own = Totals(steps=3, tokens=30, trained_tokens=20, seconds=8.0, flops=4.0)
    assert callback.totals == Totals(3, 100, 30, 9.0, 6.0)
    callback._copies = 2.0
    assert callback.totals == Totals(3, 50, 15, 9.0, 3.0)


def test_other_batches_are_refused():
    callback = Throughput()
    with pytest.raises(UserError, match="packs.*list"):
        callback.on_train_batch_end(SimpleNamespace(global_step=0), None, None, [1], 0)
