"""The unlearning study: every loss on models that have memorised rows of LUME's form, scored as the benchmark scores.

A tiny Llama memorises invented documents (`tasks.people`) from scratch; another, the gold standard, all but those to
forget. Then each loss unlearns with an adapter, at a learning rate chosen on other documents and another model.

Every finished run is one JSON file, and a run whose file is there is not made again:

    python -m benchmarks.unlearning_study --out docs/studies/results/unlearning --work runs/unlearning
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
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
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.data.unlearning.datamodule import UnlearnData
from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.regimes.unlearn.losses import (
    GA,
    GD,
    KL,
    NPO,
    RMU,
    IdkDPO,
    Memorize,
    RetainOnly,
    SimNPO,
    UnlearningLoss,
)
from lit_reason.regimes.unlearn.regime import UnlearnRegime
from lit_reason.rollout.config import SamplingConfig
from lit_reason.tasks.people import write_people

DATE = "2026-11-25"
EPOCHS = 10
SWEEP, REPORTED = 99, 0  # seeds of documents: on which rates are chosen, and of which the table is
SEEDS = (0, 1, 2)  # of adapters and order
SAMPLING = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=40, batch_size=128)
RATES = (2e-3, 6e-3)  # 5e-4 left the memory as it was in all arms that it was tried on

# Name in the tables: the loss, and settings of the data that go with it.
Arm = tuple[Callable[[], UnlearningLoss], dict[str, Any]]
LOSSES: dict[str, Arm] = {
    "GA": (GA, {}),
    "GD": (GD, {}),
    "KL": (KL, {}),
    "NPO": (partial(NPO, retain="none"), {}),
    "NPO + retain": (NPO, {}),
    "NPO + KL": (partial(NPO, retain="kl"), {}),
    "SimNPO": (SimNPO, {}),
    "IdkDPO": (IdkDPO, {}),
    "RMU": (partial(RMU, layer=1, coefficient=10.0), {}),
}
# Our own attempts, at equal epochs over the forget rows: three retain rows in turn beside each of them, with chunks of
# forget rows, with a ceiling (a loss at which a token counts as forgotten), and with the best of the others.
OURS: dict[str, Arm] = {
    "ours: chunks": (NPO, {"retain_ratio": 3, "chunk_rows": 20, "chunk_passes": 5}),
    "ours: ceiling": (partial(GD, ceiling=6.0), {"retain_ratio": 3}),
    "ours: RMU": (partial(RMU, layer=1, coefficient=10.0), {"retain_ratio": 3}),
}
TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 192,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}


def data_of(folder: Path, seed: int, batch_rows: int, **settings: Any) -> UnlearnData:
    """The data module of a run; `settings` go before the files of `folder`."""
    files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "members", "nonmembers", "utility")}
    return UnlearnData(**{**files, **settings}, batch_rows=batch_rows, max_length=192, seed=seed)


def trainer_of(folder: Path, epochs: int, every: int = 0, callbacks: list[Any] | None = None) -> ReasonTrainer:
    """The trainer of a run that validates every so many epochs; 0 never."""
    return ReasonTrainer(
        accelerator="cpu",
        logger=CSVLogger(folder, "log"),
        max_epochs=epochs,
        check_val_every_n_epoch=every or None,
        limit_val_batches=1.0 if every else 0,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def write_tokenizer(data: Path, folder: Path) -> int:
    """A tokenizer of the texts, and how many tokens it has."""
    rows = [json.loads(line) for name in ("forget", "retain", "common") for line in (data / f"{name}.jsonl").open()]
    tokenizer = train_tokenizer((row["input"] + row["output"] for row in rows), 512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def learn(data: Path, work: Path, seed: int, loss: type[UnlearningLoss], epochs: int) -> Path:
    """A model from scratch that has memorised everything, or everything but the forget set. Made once."""
    folder = work / f"{loss.__name__.lower()}-{seed}"
    if (folder / "done").exists():
        return Path((folder / "done").read_text())
    seed_everything(seed)
    fields = {**TINY, "vocab_size": write_tokenizer(data, folder / "tokenizer")}
    lm = ModelConfig(config=fields, tokenizer=str(folder / "tokenizer"))
    regime = UnlearnRegime(lm, loss(), OptimConfig(lr=3e-3, warmup=0.05))
    rows = data_of(data, seed, 16, retain=[str(data / f"{name}.jsonl") for name in ("retain", "common")])
    trainer = trainer_of(folder, epochs, callbacks=[HFExport()])
    trainer.fit(regime, datamodule=rows)
    export = run_folder(trainer) / "export"
    (folder / "done").write_text(str(export))
    return export


def score(data: Path, work: Path, model: Path) -> dict[str, float]:
    """The benchmark's scores of a model."""
    regime = UnlearnRegime(ModelConfig(path=str(model)), NPO(), sampling=SAMPLING)
    trainer = trainer_of(work / "test", 1)
    trainer.test(regime, datamodule=data_of(data, 0, 16))
    return json.loads((run_folder(trainer) / "unlearning.json").read_text())


def unlearn(data: Path, work: Path, seed: int, start: Path, arm: Arm, lr: float, *, generate: bool) -> dict[str, Any]:
    """One unlearning run with a LoRA adapter: scores at its end, and with `generate` curves by epoch too."""
    make, settings = arm
    epochs = EPOCHS // settings.get("chunk_passes", 1)
    every = min(2, epochs) if generate else 0
    seed_everything(seed)
    lm = ModelConfig(path=str(start), adapter=AdapterConfig(rank=16))
    optim = OptimConfig(lr=lr, weight_decay=0.01, schedule="linear", warmup=0.1)
    regime = UnlearnRegime(lm, make(), optim, SAMPLING)
    trainer = trainer_of(work / "unlearn", epochs, every)
    try:
        trainer.fit(regime, datamodule=data_of(data, seed, 12, **settings))
    except UserError as error:  # a run that diverged is a result
        return {"failed": str(error), "lr": lr}
    found, losses = regime.rescore(generate=generate)
    log = read_metrics(run_folder(trainer) / "metrics.csv")
    names = ("val/forget_loss", "val/retain_loss", "val/utility", "val/attack_auc", "val/composite")
    curves = {name: [value for _, value in log.points(name)] for name in names} if generate else {}
    scores = {**found.figures(), **losses}
    return {"scores": scores, "curves": curves, "lr": lr, "epochs_between": every * (EPOCHS // epochs)}


class Study:
    """The runs, each made once.

    Args:
        out: where results lie, a file a run.
        work: where models and logs lie.
        docs: documents of each task in each set.
        epochs: of memorising.
    """

    def __init__(self, out: Path, work: Path, docs: int, epochs: int) -> None:
        self.out, self.work, self.docs, self.epochs = out, work, docs, epochs
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a run, from its file where there is one."""
        path = self.out / f"{name}.json"
        if not path.exists():
            began = time.process_time()
            found = {**make(), "name": name, "cpu_seconds": round(time.process_time() - began, 1), **facts()}
            path.write_text(json.dumps(found, indent=1) + "\n")
            scores = found.get("scores", {})
            parts = (f"{key} {scores.get(key, math.nan):.3f}" for key in ("aggregate", "attack", "utility", "final"))
            print(f"{name:<40}{', '.join(parts)}, {found['cpu_seconds']} s", flush=True)
        return json.loads(path.read_text())

    def data(self, documents: int) -> Path:
        """The documents of a seed."""
        return write_people(self.work / f"people-{documents}", docs=self.docs, seed=documents)

    def start(self, documents: int, loss: type[UnlearningLoss] = Memorize) -> Path:
        """The model that remembers all documents of a seed, or that never saw those to forget."""
        return learn(self.data(documents), self.work, documents, loss, self.epochs)

    def swept(self, name: str, arm: Arm, lr: float) -> dict[str, Any]:
        """A loss at a rate, on documents that are not reported, judged token by token at its end."""
        data, start = self.data(SWEEP), self.start(SWEEP)
        label = f"sweep-{file_name(name)}-{lr:g}"
        return self.run(label, lambda: unlearn(data, self.work, SWEEP, start, arm, lr, generate=False))

    def cell(self, name: str, arm: Arm, seed: int, lr: float) -> dict[str, Any]:
        """A loss at its rate with one seed, judged by generation at its end."""
        data, start = self.data(REPORTED), self.start(REPORTED)
        label = f"{file_name(name)}-{seed}"
        return self.run(label, lambda: unlearn(data, self.work, seed, start, arm, lr, generate=True))

    def rate(self, name: str, arm: Arm) -> float:
        """The rate with the highest composite on the documents that are not reported."""
        found = {lr: self.swept(name, arm, lr).get("scores", {}).get("composite", -1.0) for lr in RATES}
        return max(RATES, key=lambda lr: found[lr])

    def all(self) -> dict[str, list[dict[str, Any]]]:
        """All arms in the order of the table; seed after seed, so that a study cut short has all arms."""
        arms: dict[str, list[dict[str, Any]]] = {}
        data = self.data(REPORTED)
        for kind, loss in (("start", Memorize), ("gold", RetainOnly)):
            model = self.start(REPORTED, loss)
            arms[kind] = [self.run(kind, lambda m=model: {"scores": score(data, self.work, m)})]
        chosen = {**LOSSES, **OURS}
        rates = {name: self.rate(name, arm) for name, arm in chosen.items()}
        for seed in SEEDS:
            for name, arm in chosen.items():
                arms.setdefault(f"{name} ({rates[name]:g})", []).append(self.cell(name, arm, seed, rates[name]))
                (self.out / "table.md").write_text(table(arms) + "\n")
        return arms


def file_name(name: str) -> str:
    """An arm's name as part of a file's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def facts() -> dict[str, Any]:
    """Where and with what a result was made."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "rouge-score")}
    return {"date": DATE, "machine": "2 cores, no GPU", "python": platform.python_version(), "versions": packages}


def interval(values: list[float]) -> str:
    """Mean with half the width of the 95 % interval of Student's t over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    half = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def table(arms: dict[str, list[dict[str, Any]]]) -> str:
    """The study's table in Markdown."""
    columns = ("final", "aggregate", "attack", "attack_auc", "utility", "broken_forget", "composite")
    lines = ["| arm (rate) | runs | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for name, runs in arms.items():
        scores = [run["scores"] for run in runs if "scores" in run]
        cells = [interval([s[c] for s in scores if c in s]) for c in columns]
        note = "" if len(scores) == len(runs) else f", {len(runs) - len(scores)} diverged"
        lines.append(f"| {name} | {len(runs)}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """What each arm reaches in the parts of the final score, and how seed 0 got there.

    Args:
        arms: runs by arm; those named `start` and `gold` have no curves.
        path: the SVG file.
    """
    figure, (parts, curve) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = dict(zip(arms, plt.get_cmap("tab20").colors, strict=False))
    columns = ("aggregate", "attack", "utility", "final")
    for place, (name, runs) in enumerate(arms.items()):
        scores = [run["scores"] for run in runs if "scores" in run]
        for k, column in enumerate(columns):
            at = k + (place - len(arms) / 2) * 0.06
            values = [s[column] for s in scores]
            parts.plot([at] * len(values), values, "o", color=colours[name], markersize=4)
        for run in runs[:1]:
            if losses := run.get("curves", {}).get("val/forget_loss"):
                epochs = [run["epochs_between"] * (i + 1) for i in range(len(losses))]
                curve.plot(epochs, losses, marker=".", color=colours[name])
                curve.plot(epochs, run["curves"]["val/retain_loss"], ":", color=colours[name])
        parts.plot([], [], "o", color=colours[name], label=name)
    parts.set(xticks=range(4), xticklabels=columns, ylim=(-0.03, 1.03), title="Parts of the final score, a dot a run")
    curve.set(
        yscale="log", xlabel="epoch", ylabel="nats a token", title="Loss of the sets, seed 0: forget; retain dotted"
    )
    figure.legend(*parts.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studies/results/unlearning"))
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning"))
    parser.add_argument("--docs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    arms = Study(given.out, given.work, given.docs, given.epochs).all()
    draw(arms, given.out / "unlearning.svg")
    print(table(arms))


if __name__ == "__main__":
    main()
