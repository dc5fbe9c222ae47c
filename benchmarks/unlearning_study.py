"""The unlearning study: every loss on models that have memorised rows of LUME's form, scored as the benchmark scores.

Two tiers share this program. `people` trains a tiny Llama from scratch on invented documents (`tasks.people`). `lume`
takes files of LUME's rows and a model of the user's own. For each seed a model memorises both sets, another (the gold
standard) the retain set alone; then each loss unlearns at one learning rate, chosen on a seed that is not reported.

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
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.tasks.people import write_people

DATE = "2026-11-25"
EPOCHS = 10
SWEEP_SEED, SEEDS = 99, (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)

# Name in the tables: the options of the loss.
LOSSES: dict[str, list[str]] = {
    "GA": ["GA"],
    "GD": ["GD"],
    "KL": ["KL"],
    "NPO": ["NPO", "retain=none"],
    "NPO + retain": ["NPO"],
    "NPO + KL": ["NPO", "retain=kl"],
    "SimNPO": ["SimNPO"],
    "IdkDPO": ["IdkDPO"],
    "RMU": ["RMU", "layer=1", "coefficient=10.0"],
}
# Our own attempt: bounded loss on sums, chunks of forget rows, three retain rows each in turn, late layers alone.
OURS: dict[str, list[str]] = {
    "ours: ratio 3": ["NPO", "--data.retain_ratio=3"],
    "ours: ratio 3, chunks": ["NPO", "--data.retain_ratio=3", "--data.chunk_rows=27", "--data.chunk_passes=5"],
    "ours: GD with ceiling, ratio 3": ["GD", "ceiling=6.0", "--data.retain_ratio=3"],
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


def model_options(loss: list[str]) -> list[str]:
    """Command-line options of a loss."""
    name, *rest = loss
    return [f"--model.loss={name}", *(o if o.startswith("--") else f"--model.loss.{o}" for o in rest)]


def base_options(data: Path, run: Path, seed: int) -> list[str]:
    """What all runs share."""
    return [
        *(f"--seed_everything={seed}", "--model=UnlearnRegime", "--data=UnlearnData", f"--data.seed={seed}"),
        *(f"--data.{name}={data / name}.jsonl" for name in ("forget", "retain", "members", "nonmembers", "utility")),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={run}", "--trainer.logger.name=log"),
        *("--model.sampling.max_new_tokens=40", "--model.sampling.batch_size=128", "--data.max_length=192"),
        *("--trainer.enable_checkpointing=false", "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=5"),
    ]


def write_tokenizer(data: Path, folder: Path) -> int:
    """A tokenizer of the texts, and how many tokens it has."""
    rows = [json.loads(line) for name in ("forget", "retain", "common") for line in (data / f"{name}.jsonl").open()]
    tokenizer = train_tokenizer((row["input"] + row["output"] for row in rows), 512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def learn(data: Path, work: Path, seed: int, loss: str, epochs: int) -> Path:
    """A model from scratch that has memorised everything, or everything but the forget set. Made once."""
    folder = work / f"{loss.lower()}-{seed}"
    if (folder / "done").exists():
        return Path((folder / "done").read_text())
    size = write_tokenizer(data, folder / "tokenizer")
    fields = {**TINY, "vocab_size": size}
    retain = json.dumps([str(data / "retain.jsonl"), str(data / "common.jsonl")])
    given = [
        *base_options(data, folder, seed),
        *(f"--data.retain={retain}", f"--model.loss={loss}", "--data.batch_rows=16"),
        *(f"--model.lm.config={json.dumps(fields)}", f"--model.lm.tokenizer={folder / 'tokenizer'}"),
        *("--model.optim.lr=3e-3", "--model.optim.warmup=0.05", f"--trainer.max_epochs={epochs}"),
        *("--trainer.limit_val_batches=0", "--trainer.gradient_clip_val=1.0", "--trainer.callbacks+=HFExport"),
    ]
    cli = build("fit", given)
    cli.run_verb()
    export = run_folder(cli.trainer) / "export"
    (folder / "done").write_text(str(export))
    return export


def score(data: Path, work: Path, seed: int, model: Path) -> dict[str, float]:
    """The benchmark's scores of a model."""
    cli = build("test", [*base_options(data, work / "test", seed), "--model.loss=NPO", f"--model.lm.path={model}"])
    cli.run_verb()
    return json.loads((run_folder(cli.trainer) / "unlearning.json").read_text())


def unlearn(data: Path, work: Path, seed: int, start: Path, loss: list[str], lr: float) -> dict[str, Any]:
    """One unlearning run with a LoRA adapter: scores by generation at its end, and the curves of its epochs."""
    passes = next((int(o.partition("=")[2]) for o in loss if o.startswith("--data.chunk_passes")), 1)
    given = [
        *base_options(data, work / "unlearn", seed),
        *model_options(loss),
        *(f"--model.lm.path={start}", "--model.lm.adapter.rank=16", f"--model.optim.lr={lr}", "--data.batch_rows=8"),
        *("--model.optim.schedule=linear", "--model.optim.warmup=0.1", "--trainer.gradient_clip_val=1.0"),
        *(f"--trainer.max_epochs={EPOCHS // passes}", f"--model.score_every={EPOCHS // passes}"),
    ]
    cli = build("fit", given)
    start_cpu = time.process_time()
    try:
        cli.run_verb()
    except Exception as error:  # a run that diverged is a result
        return {"failed": str(error)}
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    names = ("val/forget_loss", "val/retain_loss", "val/utility", "val/attack_auc", "val/composite")
    curves = {name: [value for _, value in log.points(name)] for name in names}
    figures = {
        k.removeprefix("val/"): float(v) for k, v in cli.trainer.callback_metrics.items() if k.startswith("val/")
    }
    return {"scores": figures, "curves": curves, "cpu_seconds": time.process_time() - start_cpu}


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

    def run(self, name: str, make: Any) -> dict[str, Any]:
        """The result of a run, from its file where there is one."""
        path = self.out / f"{name}.json"
        if not path.exists():
            began = time.process_time()
            found = {**make(), "name": name, "total_cpu_seconds": round(time.process_time() - began, 1), **self.facts()}
            path.write_text(json.dumps(found, indent=1) + "\n")
            scores = found.get("scores", {})
            parts = (f"{key} {scores.get(key, math.nan):.3f}" for key in ("aggregate", "attack", "utility", "final"))
            print(f"{name:<40}{', '.join(parts)}, {found['total_cpu_seconds']} s", flush=True)
        return json.loads(path.read_text())

    def facts(self) -> dict[str, Any]:
        """Where and with what a result was made."""
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "rouge-score")}
        return {"date": DATE, "machine": "2 cores, no GPU", "python": platform.python_version(), "versions": packages}

    def data(self, seed: int) -> Path:
        """The documents of a seed."""
        return write_people(self.work / f"people-{seed}", docs=self.docs, seed=seed)

    def starts(self, seed: int) -> tuple[Path, Path]:
        """The model that remembers all, and the one that never saw the forget set."""
        data = self.data(seed)
        return learn(data, self.work, seed, "Memorize", self.epochs), learn(
            data, self.work, seed, "RetainOnly", self.epochs
        )

    def cell(self, seed: int, name: str, loss: list[str], lr: float) -> dict[str, Any]:
        """One loss at one rate on one seed."""
        label = f"{name.lower().replace(' ', '_').replace(':', '').replace('+', 'and').replace(',', '')}-{lr:g}-{seed}"
        return self.run(label, lambda: unlearn(self.data(seed), self.work, seed, self.starts(seed)[0], loss, lr))

    def best_rate(self, name: str, loss: list[str]) -> float:
        """The rate with the highest final score on the seed that is not reported; the composite breaks ties."""
        found = {lr: self.cell(SWEEP_SEED, name, loss, lr).get("scores", {}) for lr in RATES}
        return max(RATES, key=lambda lr: (found[lr].get("final", -1.0), found[lr].get("composite", -1.0)))

    def all(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """All arms in the order of the table."""
        for kind in ("start", "gold"):
            runs = []
            for seed in SEEDS:
                model = self.starts(seed)[kind == "gold"]
                runs.append(
                    self.run(f"{kind}-{seed}", lambda m=model, s=seed: {"scores": score(self.data(s), self.work, s, m)})
                )
            yield kind, runs
        for name, loss in {**LOSSES, **OURS}.items():
            lr = self.best_rate(name, loss)
            yield f"{name} ({lr:g})", [self.cell(seed, name, loss, lr) for seed in SEEDS]


def interval(values: list[float]) -> str:
    """Mean with half the width of the 95 % interval of Student's t over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    half = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def table(arms: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """The study's table in Markdown."""
    columns = ("final", "aggregate", "attack", "attack_auc", "utility", "broken_forget", "composite")
    lines = ["| arm (rate) | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, runs in arms:
        scores = [run["scores"] for run in runs if "scores" in run]
        cells = [interval([s[c] for s in scores if c in s]) for c in columns]
        note = "" if len(scores) == len(runs) else f" ({len(runs) - len(scores)} of {len(runs)} diverged)"
        lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studies/results/unlearning"))
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning"))
    parser.add_argument("--docs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    arms = list(Study(given.out, given.work, given.docs, given.epochs).all())
    text = table(arms)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
