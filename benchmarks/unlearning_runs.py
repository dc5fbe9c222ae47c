"""What the studies of unlearning share: arms, the runs of an arm, each made once, and the table and picture of them."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger

from lit_reason.callbacks.hf_export import HFExport
from lit_reason.core.config import OptimConfig
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.core.trainer import ReasonTrainer
from lit_reason.data.unlearning.datamodule import UnlearnData
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.regimes.unlearn.losses import GA, GD, KL, NPO, RMU, IdkDPO, SimNPO, UnlearningLoss
from lit_reason.regimes.unlearn.reference import ReferenceMode
from lit_reason.regimes.unlearn.regime import UnlearnRegime
from lit_reason.regimes.unlearn.step import Step
from lit_reason.rollout.config import SamplingConfig

FILES = ("forget", "retain", "members", "nonmembers", "utility")
CURVES = ("val/forget_loss", "val/retain_loss", "val/utility", "val/attack_auc", "val/composite")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of t by number of runs

# Runs of each row of the table, by its name.
Runs = dict[str, list[dict[str, Any]]]


class Level(UnlearningLoss):
    """Hold every token to forget at the loss of one that was never seen, learn a refusal, and keep the retain rows.

    A loss pushed beyond that level betrays the row as a low one does: the attack then tells members by what is too
    unlikely. The distance from the level is as flat as gradient difference, and turns round where it is reached.

    Args:
        level: mean loss of rows that the model never saw, in nats a token.
    """

    refuse = True

    def __init__(self, level: float) -> None:
        super().__init__("nll")
        self.level = level

    def forget(self, step: Step) -> torch.Tensor:
        """Mean distance of the forget tokens' losses from the level, and the loss of the refusals."""
        distance = (self.level + step.stats.logp_S).abs()
        return step.mean_over_tokens(distance, Role.FORGET) + step.mean_nll(Role.REFUSAL)


@dataclass(frozen=True)
class Arm:
    """A way to unlearn.

    Attributes:
        loss: makes the loss.
        data: settings of the data that go with it.
    """

    loss: Callable[[], UnlearningLoss]
    data: dict[str, Any] = field(default_factory=dict)


def literature(layer: int, coefficient: float) -> dict[str, Arm]:
    """The losses that are not ours, by their names in the tables.

    Args:
        layer: whose state `RMU` reads.
        coefficient: length of the state that it asks for.
    """
    return {
        "GA": Arm(GA),
        "GD": Arm(GD),
        "KL": Arm(KL),
        "NPO": Arm(partial(NPO, retain="none")),
        "NPO + retain": Arm(NPO),
        "NPO + KL": Arm(partial(NPO, retain="kl")),
        "SimNPO": Arm(SimNPO),
        "IdkDPO": Arm(IdkDPO),
        "RMU": Arm(partial(RMU, layer=layer, coefficient=coefficient)),
    }


@dataclass(frozen=True)
class Setting:
    """What all runs of a study have in common.

    Attributes:
        arms: by their names in the table.
        rates: learning rates to choose from, rising; the search begins in the middle. A single one is not swept.
        sweep: seeds of documents and of adapter in the sweep of rates.
        seeds: of adapters and order, of the runs that are reported. Their documents are those of seed 0.
        epochs: passes over the forget rows.
        batch_rows: forget rows of a step.
        max_length: longest row in tokens.
        new_tokens: longest answer that is generated.
        answers: prompts of one batch of generation.
        curve_epochs: epochs between two validations of a run that is drawn.
        curve_seeds: of the reported runs that validate, for curves.
    """

    arms: dict[str, Arm]
    rates: tuple[float, ...]
    sweep: tuple[int, int] = (99, 99)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    batch_rows: int = 12
    max_length: int = 192
    new_tokens: int = 40
    answers: int = 128
    curve_epochs: int = 2
    curve_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def sampling(self) -> SamplingConfig:
        """Greedy, as in the benchmark."""
        return SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=self.new_tokens, batch_size=self.answers)


class Study(ABC):
    """The runs, each made once: a finished one is a JSON file, and a run whose file is there is not made again.

    Args:
        setting: what they share.
        out: where results lie, a file a run.
        work: where models and logs lie.
    """

    def __init__(self, setting: Setting, out: Path, work: Path) -> None:
        self.setting, self.out, self.work = setting, out, work
        out.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def data(self, documents: int) -> Path:
        """The folder with the documents of a seed, in files named as in `FILES`."""

    @abstractmethod
    def model(self, kind: str, documents: int) -> Path:
        """The model that remembers all documents of a seed (`start`), or never saw those to forget (`gold`)."""

    def run(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a run, from its file where there is one."""
        path = self.out / f"{name}.json"
        if not path.exists():
            began = time.process_time()
            found = {**make(), "cpu_seconds": round(time.process_time() - began, 1)}
            path.write_text(json.dumps(rounded(found), indent=1) + "\n")
            scores = found.get("scores", {})
            parts = (f"{key} {scores.get(key, math.nan):.3f}" for key in ("aggregate", "attack", "utility", "final"))
            print(f"{name:<40}{', '.join(parts)}, {found['cpu_seconds']} s", flush=True)
        return json.loads(path.read_text())

    def rows(self, documents: int, seed: int, **settings: Any) -> UnlearnData:
        """The data module of a run; `settings` go before what the study says."""
        folder = self.data(documents)
        files = {name: str(path) for name in FILES if (path := folder / f"{name}.jsonl").exists()}
        ours = {"batch_rows": self.setting.batch_rows, "max_length": self.setting.max_length, "seed": seed}
        return UnlearnData(**{**files, **ours, **settings})

    def learn(self, name: str, regime: Callable[[], UnlearnRegime], rows: UnlearnData, epochs: int) -> Path:
        """Train a model, once, and say where it lies.

        Args:
            name: of its folder.
            regime: makes the regime.
            rows: the rows.
            epochs: passes over them.
        """
        done = self.work / name / "done"
        if not done.exists():
            seed_everything(rows.seed)
            trainer = trainer_of(self.work / name, epochs, callbacks=[HFExport()])
            trainer.fit(regime(), datamodule=rows)
            done.write_text(str(run_folder(trainer) / "export"))
        return Path(done.read_text())

    def score(self, kind: str) -> dict[str, Any]:
        """The benchmark's scores of a model of which nothing was unlearnt."""
        regime = UnlearnRegime(ModelConfig(path=str(self.model(kind, 0))), NPO(), sampling=self.setting.sampling)
        trainer = trainer_of(self.work / "test", 1)
        trainer.test(regime, datamodule=self.rows(0, 0))
        return {"scores": json.loads((run_folder(trainer) / "unlearning.json").read_text())}

    def unlearn(self, arm: Arm, lr: float, documents: int, seed: int, *, generate: bool) -> dict[str, Any]:
        """One run with a LoRA adapter: scores at its end, with `generate` by its answers, and curves by epoch."""
        epochs = self.setting.epochs // arm.data.get("chunk_passes", 1)
        drawn = generate and seed in self.setting.curve_seeds
        every = min(self.setting.curve_epochs, epochs) if drawn else 0
        lm = ModelConfig(path=str(self.model("start", documents)), adapter=AdapterConfig(rank=16))
        seed_everything(seed)
        optim = OptimConfig(lr=lr, weight_decay=0.01, schedule="linear", warmup=0.1)
        loss = arm.loss()
        reference: ReferenceMode = "cached" if loss.needs == "sums" else "auto"
        regime = UnlearnRegime(lm, loss, optim, self.setting.sampling, reference)
        trainer = trainer_of(self.work / "unlearn", epochs, every)
        try:
            trainer.fit(regime, datamodule=self.rows(documents, seed, **arm.data))
        except UserError as error:  # a run that diverged is a result
            return {"failed": str(error), "lr": lr}
        found, losses = regime.rescore(generate=generate)
        result: dict[str, Any] = {"scores": {**found.figures(), **losses}, "lr": lr}
        log = read_metrics(run_folder(trainer) / "metrics.csv")
        if every:
            result["curves"] = {name: [value for _, value in log.points(name)] for name in CURVES}
            result["epochs_between"] = every * (self.setting.epochs // epochs)
        return result

    def swept(self, name: str, lr: float) -> float:
        """The composite of an arm at a rate in the sweep, judged token by token at its end; -1 where it diverged."""
        arm, (documents, seed) = self.setting.arms[name], self.setting.sweep
        label = f"sweep-{file_name(name)}-{lr:g}"
        found = self.run(label, lambda: self.unlearn(arm, lr, documents, seed, generate=False))
        return found.get("scores", {}).get("composite", -1.0)

    def rate(self, name: str) -> float:
        """The rate of an arm with the highest composite in the sweep, its neighbours having been tried.

        The three in the middle are tried in any case: a model left alone scores better than one half spoilt, so that
        the way from low rates to good ones may lead down first. A tie to two places goes to the higher rate, which
        forgets more.
        """
        rates = self.setting.rates
        if len(rates) == 1:
            return rates[0]
        tried = {len(rates) // 2 + step for step in (-1, 0, 1)}
        while True:
            best = max(tried, key=lambda i: (round(self.swept(name, rates[i]), 2), i))
            beside = {best - 1, best + 1} & set(range(len(rates))) - tried
            if not beside:
                return rates[best]
            tried |= beside

    def cell(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        """An arm at a rate with one seed, judged by generation at its end."""
        arm, label = self.setting.arms[name], f"{file_name(name)}-{lr:g}-{seed}"
        return self.run(label, lambda: self.unlearn(arm, lr, 0, seed, generate=True))

    def all(self) -> Runs:
        """All runs in the order of the table; seed after seed, so that a study cut short has all arms."""
        arms = {kind: [self.run(kind, partial(self.score, kind))] for kind in ("start", "gold")}
        rates = {name: self.rate(name) for name in self.setting.arms}
        for seed in self.setting.seeds:
            for name, lr in rates.items():
                arms.setdefault(f"{name} ({lr:g})", []).append(self.cell(name, lr, seed))
                (self.out / "table.md").write_text(table(arms) + "\n")
        draw(arms, self.out / "unlearning.svg")
        return arms

    def record(self, path: Path, **facts: Any) -> None:
        """Write all runs that are there into one file.

        Args:
            path: the file.
            facts: what else it says, such as the command.
        """
        runs = {file.stem: json.loads(file.read_text()) for file in sorted(self.out.glob("*.json"))}
        packages = ("torch", "transformers", "peft", "lightning", "rouge-score")
        about = {
            "date": date.today().isoformat(),
            "machine": "2 cores, no GPU",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
        }
        path.write_text(json.dumps({**about, **facts, "runs": runs}, indent=1) + "\n")


def trainer_of(folder: Path, epochs: int, every: int = 0, callbacks: list[Any] | None = None) -> ReasonTrainer:
    """The trainer of a run that validates every so many epochs; 0 never."""
    return ReasonTrainer(
        accelerator="cpu",
        logger=CSVLogger(folder, "log", flush_logs_every_n_steps=10),
        max_epochs=epochs,
        check_val_every_n_epoch=every or None,
        limit_val_batches=1.0 if every else 0,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def file_name(name: str) -> str:
    """An arm's name as part of a file's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def rounded(found: Any) -> Any:
    """Figures to five places, however deep they lie."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 5) if isinstance(found, float) else found


def interval(values: list[float]) -> str:
    """Mean with half the width of the 95 % interval of Student's t over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def table(arms: Runs) -> str:
    """The study's table in Markdown."""
    columns = ("final", "aggregate", "attack", "attack_auc", "utility", "broken_forget", "composite")
    lines = ["| arm (rate) | runs | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for name, runs in arms.items():
        scores = [run["scores"] for run in runs if "scores" in run]
        cells = [interval([s[c] for s in scores if c in s]) for c in columns]
        note = "" if len(scores) == len(runs) else f", {len(runs) - len(scores)} diverged"
        lines.append(f"| {name} | {len(runs)}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(arms: Runs, path: Path) -> None:
    """What each arm reaches in the parts of the final score, and how seed 0 got there.

    Args:
        arms: runs by arm; those named `start` and `gold` have no curves.
        path: the SVG file.
    """
    figure, (parts, curve, kept) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colours = dict(zip(arms, plt.get_cmap("tab20").colors, strict=False))
    columns = ("aggregate", "attack", "utility", "final")
    for place, (name, runs) in enumerate(arms.items()):
        scores = [run["scores"] for run in runs if "scores" in run]
        for k, column in enumerate(columns):
            at = k + (place - len(arms) / 2) * 0.06
            values = [s[column] for s in scores]
            parts.plot([at] * len(values), values, "o", color=colours[name], markersize=4)
        curves = runs[0].get("curves", {})
        for axes, figure_name, line in (
            (curve, "forget_loss", ".-"),
            (curve, "retain_loss", ":"),
            (kept, "utility", ".-"),
        ):
            if values := curves.get(f"val/{figure_name}"):
                epochs = [runs[0]["epochs_between"] * (i + 1) for i in range(len(values))]
                axes.plot(epochs, values, line, color=colours[name])
        parts.plot([], [], "o", color=colours[name], label=name)
    parts.set(xticks=range(4), xticklabels=columns, ylim=(-0.03, 1.03), title="Parts of the final score, a dot a run")
    curve.set(
        yscale="log", xlabel="epoch", ylabel="nats a token", title="Loss of the sets, seed 0: forget; retain dotted"
    )
    kept.set(xlabel="epoch", ylim=(-0.03, 1.03), title="Utility, seed 0")
    for axes in (curve, kept):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*parts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
