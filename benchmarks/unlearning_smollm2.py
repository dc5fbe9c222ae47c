"""The unlearning study on SmolLM2-135M and rows of LUME's own files: every loss on one model that has memorised them.

The model memorises some documents of Task1 and Task2 with all its weights; another, the gold standard, only those to
retain. Then each loss unlearns with a LoRA adapter, at a learning rate chosen with another seed. Give LUME's files
(GitHub `amazon-science/lume-llm-unlearning`, Apache-2.0):

    python -m benchmarks.unlearning_smollm2 --model HuggingFaceTB/SmolLM2-135M-Instruct forget.jsonl retain.jsonl

Every finished run is one JSON file, and a run whose file is there is not made again. No text of a row is recorded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.unlearning_runs import Arm, Level, Setting, Study, literature, table
from lit_reason.core.config import OptimConfig
from lit_reason.data.unlearning.rows import document_of
from lit_reason.models.config import ModelConfig
from lit_reason.regimes.unlearn.losses import NPO, IdkDPO, Memorize, RetainOnly
from lit_reason.regimes.unlearn.regime import UnlearnRegime

DOCUMENTS = {"Task1": 2, "Task2": 3}  # in each set
KINDS = {"start": Memorize, "gold": RetainOnly}
MEMORISE_EPOCHS, MEMORISE_LR = 10, 3e-4
LAYER, COEFFICIENT = 10, 150.0  # of 30 layers; about the length of the states there

# Our own attempts, at equal epochs over the forget rows: three retain rows in turn beside each of them. At the usual
# beta of 0.1 the forget rows end far above the loss of rows that the model never saw, and the attack tells them by
# that; a larger one ends sooner.
THREE = {"retain_ratio": 3}
OURS = {
    "ours: NPO 0.25": Arm(partial(NPO, beta=0.25), THREE),
    "ours: NPO": Arm(NPO, THREE),
    "ours: IdkDPO 0.02": Arm(partial(IdkDPO, beta=0.02), THREE),
    "ours: level": Arm(partial(Level, level=4.0), THREE),
}
SETTING = Setting(
    arms={**literature(LAYER, COEFFICIENT), **OURS},
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    sweep=(0, 99),
    seeds=(0, 1, 2),
    epochs=4,
    batch_rows=2,
    max_length=512,
    new_tokens=80,
    answers=16,
    curve_epochs=1,
    curve_seeds=(0,),
)

Row = dict[str, Any]


def write_subset(forget: Path, retain: Path, folder: Path) -> Path:
    """Write the shortest documents of some tasks as `forget`, `retain`, `members` and `nonmembers`.

    Of the shortest documents of a file every third is taken; the other two thirds of those of the forget file no model
    sees: they are the attack's non-members, of the same length and style as its members.

    Args:
        forget: LUME's file.
        retain: LUME's file.
        folder: where to.

    Returns:
        The folder.
    """
    sets: dict[str, list[Row]] = {"forget": [], "retain": [], "members": [], "nonmembers": []}
    for name, path in (("forget", forget), ("retain", retain)):
        for task, count in DOCUMENTS.items():
            chosen = shortest(path, task, 3 * count)
            for i, rows in enumerate(chosen):
                if i % 3 == 1:
                    sets[name] += rows
                if name == "forget":
                    sets["members" if i % 3 == 1 else "nonmembers"] += [document(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def shortest(path: Path, task: str, count: int) -> list[list[Row]]:
    """The rows of the shortest documents of a task, a list a document.

    Args:
        path: LUME's file.
        task: `Task1`, `Task2` or `Task3`.
        count: documents.
    """
    documents: dict[str, list[Row]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if row["task"] == task:
            documents.setdefault(document_of(row["id"]), []).append(row)
    return sorted(documents.values(), key=lambda rows: sum(len(r["input"]) + len(r["output"]) for r in rows))[:count]


def document(rows: list[Row]) -> Row:
    """The text of a document, from the row that completes it."""
    row = next(row for row in rows if row["id"].endswith("sc1"))
    return {"id": row["id"], "document": row["input"] + row["output"]}


class SmolStudy(Study):
    """One pretrained model that has memorised rows of LUME.

    Args:
        setting: what the runs share.
        out: where results lie.
        work: where models and logs lie.
        files: LUME's forget file and retain file.
        path: the model before memorising.
    """

    def __init__(self, setting: Setting, out: Path, work: Path, files: tuple[Path, Path], path: str) -> None:
        super().__init__(setting, out, work)
        self.files, self.path = files, path

    def data(self, documents: int) -> Path:
        """The one subset; there are no other documents."""
        return write_subset(*self.files, self.work / "rows")

    def model(self, kind: str, documents: int) -> Path:
        """All weights trained on the rows."""

        def regime() -> UnlearnRegime:
            return UnlearnRegime(ModelConfig(path=self.path), KINDS[kind](), OptimConfig(lr=MEMORISE_LR, warmup=0.05))

        return self.learn(kind, regime, self.rows(0, 0, batch_rows=8), MEMORISE_EPOCHS)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forget", type=Path, help="LUME's forget.jsonl")
    parser.add_argument("retain", type=Path, help="LUME's retain.jsonl")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, .gguf file, or hub id")
    parser.add_argument("--arms", nargs="+", choices=SETTING.arms, default=list(SETTING.arms), help="only these")
    parser.add_argument("--rates", type=float, nargs="+", default=SETTING.rates, help="one rate is not swept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SETTING.seeds)
    parser.add_argument("--out", type=Path, default=Path("docs/studies/results/unlearning-smollm2"))
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning-smollm2"))
    parser.add_argument("--record", type=Path, help="one file for all results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a wrecked model is full of them, and ten times as slow
    arms = {name: SETTING.arms[name] for name in given.arms}
    setting = replace(SETTING, arms=arms, rates=tuple(given.rates), seeds=tuple(given.seeds))
    study = SmolStudy(setting, given.out, given.work, (given.forget, given.retain), given.model)
    print(table(study.all()))
    if given.record:
        command = (
            "python -m benchmarks.unlearning_smollm2 forget.jsonl retain.jsonl --model SmolLM2-135M-Instruct.Q4_1.gguf"
        )
        study.record(given.record, command=command, documents=DOCUMENTS, memorise_epochs=MEMORISE_EPOCHS)


if __name__ == "__main__":
    main()
