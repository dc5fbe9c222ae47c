"""VerifiedGeneration and SampleWriter in real training runs whose accuracy at each step is known
beforehand."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rigged_model import WORDS, as_lm, chain_llama, ids_of, word_tokenizer

from lit_reason.callbacks.sample_writer import SampleWriter
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.evaluation import EvalPrompt
from lit_reason.errors import UserError
from lit_reason.metrics.intervals import wilson
from lit_reason.rollout.config import SamplingConfig

GREEDY = SamplingConfig(max_new_tokens=4, temperature=0.0, batch_size=2)
HEAD = {word: chain_llama(f"q {word}", "r 7", "c 1").lm_head.weight.detach() for word in "3456"}


class Scripted(LightningModule):
    """After step s the model answers `answers[s]` to "q"; the loss trains a number that nothing depends
    on."""

    def __init__(self, answers):
        super().__init__()
        self.lm = as_lm(chain_llama("q 3"))
        self.model = self.lm.hf  # a submodule, so that Lightning sets its mode and saves it
        self.tokenizer = word_tokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.answers = answers
        self.answer(0)

    def answer(self, step):
        with torch.no_grad():
            self.model.lm_head.weight.copy_(HEAD[self.answers[min(step, len(self.answers) - 1)]])

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def on_before_zero_grad(self, optimizer):
        self.answer(self.global_step + 1)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


class Problems(LightningDataModule):
    """ "q" is to be answered by 5, "r" by 7, "c" by 2: accuracy is 2/3 when the model answers 5, else 1/3."""

    stop_ids = (WORDS.index("<eos>"),)

    def __init__(self, rows=4):
        super().__init__()
        self.rows, self.asked = rows, []

    def eval_prompts(self, limit=None):
        self.asked.append(limit)
        return [EvalPrompt(ids_of(q), f"row:{q}", q, a) for q, a in (("q", "5"), ("r", "7"), ("c", "2"))][:limit]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(self.rows, 1), batch_size=1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1, 1))


class Watch(Callback):
    """What any later callback can read after each batch and validation."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append((trainer.global_step, float(trainer.callback_metrics.get("val/pass@1", -1))))


def trainer_with(folder, *callbacks, **settings):
    settings = {"max_steps": 4, "val_check_interval": 1, "check_val_every_n_epoch": None, **settings}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=3,
        **settings,
    )


def verified(**settings):
    return VerifiedGeneration(**{"sampling": GREEDY, "at_end": False, **settings})


def logged(folder, name="val/pass@1"):
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


LOW, HIGH = (pytest.approx(x / 3) for x in (1, 2))


def test_the_best_checkpoint_is_chosen_by_verified_accuracy(tmp_path):
    generation = verified()
    best = ModelCheckpoint(tmp_path / "best", monitor="val/pass@1", mode="max", save_top_k=1)
    trainer = trainer_with(tmp_path, best, generation)  # listed first: Lightning runs checkpoints last anyway
    trainer.fit(Scripted("34563"), Problems())
    assert [(h["step"], h["val/pass@1"]) for h in generation.history] == [(1, LOW), (2, HIGH), (3, LOW), (4, LOW)]
    saved = torch.load(best.best_model_path, weights_only=True)
    assert best.best_model_score == HIGH and saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["model.lm_head.weight"], HEAD["5"])


def test_everything_is_logged_at_its_step_and_kept_in_the_history(tmp_path):
    generation = verified(k=[1, 2], sampling=SamplingConfig(max_new_tokens=4, temperature=1.0, samples=2))
    trainer = trainer_with(tmp_path, generation)
    trainer.fit(Scripted("3555"), Problems())
    assert logged(tmp_path) == [(0, HIGH), (1, HIGH), (2, HIGH), (3, HIGH)]  # Lightning counts from 0 here
    entry = generation.history[-1]
    low, high = wilson(2, 3)
    assert entry["val/pass@2"] == HIGH and entry["val/pass@2_low"] == pytest.approx(low)
    assert entry["val/pass@1_high"] == pytest.approx(high) == logged(tmp_path, "val/pass@1_high")[-1][1]
    for name in ("closed", "ended", "traced", "generated_tokens", "repetition", "checker_errors"):
        assert logged(tmp_path, f"val/{name}")[-1][1] == entry[f"val/{name}"]
    assert entry["prompts"] == 3 and entry["epoch"] == 0 and entry["seconds"] > 0
    assert [r.completion for r in generation.last.records] == ["5", "5", "7", "7", "1", "1"]


def test_early_stopping_follows_verified_accuracy(tmp_path):
    stop = EarlyStopping("val/pass@1", mode="max", patience=2)
    trainer = trainer_with(tmp_path, stop, verified(), max_steps=20, max_epochs=20)
    trainer.fit(Scripted("3456666666"), Problems(rows=20))
    assert trainer.global_step == 4 and stop.best_score == HIGH


def test_the_sanity_check_generates_nothing(tmp_path):
    data, generation = Problems(), verified()
    trainer_with(tmp_path, generation, num_sanity_val_steps=1, max_steps=1).fit(Scripted("35"), data)
    assert [h["step"] for h in generation.history] == [1] and data.asked == [100]


def test_every_n_steps_needs_no_validation_and_reaches_checkpoints_of_the_same_interval(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/pass@1", mode="max", every_n_train_steps=2)
    generation, watch = verified(every_n_steps=2), Watch()
    trainer = trainer_with(tmp_path, best, generation, watch, max_steps=7, limit_val_batches=0)
    trainer.fit(Scripted("34355666"), Problems(rows=7))
    assert [(h["step"], h["val/pass@1"]) for h in generation.history] == [(2, LOW), (4, HIGH), (6, LOW)]
    assert logged(tmp_path) == [(2, LOW), (4, HIGH), (6, LOW)]
    assert best.best_model_score == HIGH and "step=4" in best.best_model_path
    assert watch.seen == [(1, -1), (2, LOW), (3, LOW), (4, HIGH), (5, HIGH), (6, LOW), (7, LOW)]


def test_every_n_steps_counts_optimizer_steps_not_batches_and_leaves_validation_alone(tmp_path):
    generation = verified(every_n_steps=1)
    trainer = trainer_with(tmp_path, generation, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(Scripted("345"), Problems())
    assert [(h["step"], h["val/pass@1"]) for h in generation.history] == [(1, LOW), (2, HIGH)]


def test_at_start_and_at_end(tmp_path):
    generation = verified(at_start=True, at_end=True, every_n_steps=2)
    trainer = trainer_with(tmp_path, generation, max_steps=3, limit_val_batches=0)
    trainer.fit(Scripted("5345"), Problems())
    assert [(h["step"], h["val/pass@1"]) for h in generation.history] == [(0, HIGH), (2, LOW), (3, HIGH)]
    assert logged(tmp_path) == [(0, HIGH), (2, LOW), (3, HIGH)]
    assert trainer.callback_metrics["val/pass@1"] == HIGH
    again = verified(at_end=True)
    trainer_with(tmp_path, again, max_steps=2).fit(Scripted("345"), Problems())
    assert [h["step"] for h in again.history] == [1, 2]  # the last validation was at the end already


def test_a_run_that_never_generates_says_so(tmp_path):
    with pytest.warns(UserWarning, match="never generated"):
        trainer_with(tmp_path, verified(), limit_val_batches=0, max_steps=1).fit(Scripted("35"), Problems())


def test_history_goes_on_after_a_resume(tmp_path):
    keep = ModelCheckpoint(tmp_path / "all", every_n_train_steps=2, save_top_k=-1)
    trainer_with(tmp_path, keep, verified(every_n_steps=1), max_steps=2).fit(Scripted("345"), Problems())
    resumed = verified(every_n_steps=1, at_start=True)
    trainer = trainer_with(tmp_path / "again", resumed, max_steps=4)
    trainer.fit(Scripted("3455"), Problems(), ckpt_path=keep.best_model_path, weights_only=True)
    assert [(h["step"], h["val/pass@1"]) for h in resumed.history] == [(1, LOW), (2, HIGH), (3, HIGH), (4, HIGH)]


def test_validate_generates_and_returns_the_numbers(tmp_path):
    generation = verified(every_n_steps=50, limit=2)
    figures = trainer_with(tmp_path, generation).validate(Scripted("5"), Problems(), verbose=False)
    assert figures[0]["val/pass@1"] == 1.0 and figures[0]["val/loss"] == 1.0
    assert generation.last.prompts == 2
    assert logged(tmp_path) == [(0, 1.0)]


def test_the_module_is_back_in_training_mode_and_in_the_trainers_precision(tmp_path):
    modes, autocast = [], []

    class Spy(Scripted):
        def on_before_zero_grad(self, optimizer):
            modes.append(self.model.training)
            super().on_before_zero_grad(optimizer)

    model = Spy("3456")
    model.model.float()  # autocast leaves float64 alone
    model.model.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    trainer = trainer_with(tmp_path, verified(every_n_steps=1), precision="bf16-mixed", max_steps=3)
    trainer.fit(model, Problems())
    assert modes == [True] * 3 and autocast and all(autocast)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"checker": "numric"}, "did you mean 'numeric'"),
        ({"part": "thoughts"}, "part is 'thoughts'"),
    ],
)
def test_settings_are_checked_when_they_are_given(settings, message):
    with pytest.raises(UserError, match=message):
        verified(**settings)


def test_a_run_without_prompts_is_refused_before_training(tmp_path):
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    with pytest.raises(UserError, match="needs a data module with eval_prompts"):
        trainer_with(tmp_path, verified()).fit(Scripted("3"), loader, loader)


def read_samples(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sample_writer_writes_each_evaluation_whatever_the_order_of_callbacks(tmp_path):
    sampling = SamplingConfig(max_new_tokens=4, temperature=1.0, samples=2)
    generation = verified(every_n_steps=2, sampling=sampling)
    trainer = trainer_with(tmp_path, SampleWriter(limit=2), generation)
    trainer.fit(Scripted("34455"), Problems())
    assert sorted(p.name for p in tmp_path.glob("samples-*")) == ["samples-2.jsonl", "samples-4.jsonl"]
    rows = read_samples(tmp_path / "samples-4.jsonl")
    assert [(r["row_id"], r["sample"], r["completion"], r["correct"]) for r in rows] == [
        ("row:q", 0, "5", True),
        ("row:q", 1, "5", True),
        ("row:r", 0, "7", True),
        ("row:r", 1, "7", True),
    ]
    first = read_samples(tmp_path / "samples-2.jsonl")[0]
    assert (first["completion"], first["correct"], first["reason"]) == ("4", False, "another number")
    assert rows == [r.to_dict() for r in generation.last.records[:4]]
    trainer.validate(trainer.model, Problems(), verbose=False)  # sets the callbacks up again: still one writer
    assert len(generation.listeners) == 1


def test_a_failed_write_leaves_the_earlier_file_and_nothing_half_written(tmp_path):
    generation = verified(every_n_steps=1)
    trainer = trainer_with(tmp_path, SampleWriter(), generation, max_steps=1)
    trainer.fit(Scripted("35"), Problems())
    before = (tmp_path / "samples-1.jsonl").read_text()
    broken = SimpleNamespace(records=[*generation.last.records[:1], None], samples=1)
    with pytest.raises(AttributeError):
        SampleWriter().write(trainer, 1, broken)
    assert (tmp_path / "samples-1.jsonl").read_text() == before
    assert not list(tmp_path.glob("*.part"))


def test_sample_writer_needs_a_source(tmp_path):
    with pytest.raises(UserError, match="this run has none"):
        trainer_with(tmp_path, SampleWriter()).fit(Scripted("3"), Problems())
    with pytest.raises(UserError, match="limit is 0"):
        SampleWriter(limit=0)
