"""The unlearning study at tiny scale: every loss on models that have memorised invented rows of LUME's form.

A tiny Llama memorises invented documents (`tasks.people`) from scratch; another, the gold standard, all but those to
forget. Then each loss unlearns with an adapter, at a learning rate chosen on other documents and another model.

Every finished run is one JSON file, and a run whose file is there is not made again:

    python -m benchmarks.unlearning_study --out docs/studies/results/unlearning --work runs/unlearning
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from benchmarks.unlearning_runs import Arm, Level, Setting, Study, literature, table
from lit_reason.core.config import OptimConfig
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.models.config import ModelConfig
from lit_reason.regimes.unlearn.losses import GD, NPO, RMU, Memorize, RetainOnly
from lit_reason.regimes.unlearn.regime import UnlearnRegime
from lit_reason.tasks.people import write_people

DOCS = 6  # of each task in each set
MEMORISE_EPOCHS = 40
KINDS = {"start": Memorize, "gold": RetainOnly}

# Our own attempts, at equal epochs over the forget rows: three retain rows in turn beside each of them, with chunks of
# forget rows, with a ceiling (a loss at which a token counts as forgotten), with the best of the others, and with
# refusals and the level of unseen rows.
OURS: dict[str, Arm] = {
    "ours: chunks": Arm(NPO, {"retain_ratio": 3, "chunk_rows": 20, "chunk_passes": 5}),
    "ours: ceiling": Arm(partial(GD, ceiling=6.0), {"retain_ratio": 3}),
    "ours: RMU": Arm(partial(RMU, layer=1, coefficient=10.0), {"retain_ratio": 3}),
    "ours: level": Arm(partial(Level, level=4.0), {"retain_ratio": 3}),
}
SETTING = Setting(
    arms={**literature(layer=1, coefficient=10.0), **OURS},
    rates=(5e-4, 2e-3, 6e-3, 2e-2, 6e-2),
    seeds=(0, 1, 2, 3, 4),
)
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


class TinyStudy(Study):
    """Models from scratch and invented documents; rates are chosen on documents that are not reported."""

    def data(self, documents: int) -> Path:
        """Invented people and stories."""
        return write_people(self.work / f"people-{documents}", docs=DOCS, seed=documents)

    def model(self, kind: str, documents: int) -> Path:
        """A Llama of some hundred thousand parameters, from scratch."""
        data, loss = self.data(documents), KINDS[kind]()
        name = f"{type(loss).__name__.lower()}-{documents}"
        rows = self.rows(
            documents, documents, batch_rows=16, retain=[str(data / f) for f in ("retain.jsonl", "common.jsonl")]
        )

        def regime() -> UnlearnRegime:
            tokenizer = self.work / name / "tokenizer"
            fields = {**TINY, "vocab_size": write_tokenizer(data, tokenizer)}
            return UnlearnRegime(
                ModelConfig(config=fields, tokenizer=str(tokenizer)), loss, OptimConfig(lr=3e-3, warmup=0.05)
            )

        return self.learn(name, regime, rows, MEMORISE_EPOCHS)


def write_tokenizer(data: Path, folder: Path) -> int:
    """A tokenizer of the texts, and how many tokens it has."""
    rows = [json.loads(line) for name in ("forget", "retain", "common") for line in (data / f"{name}.jsonl").open()]
    tokenizer = train_tokenizer((row["input"] + row["output"] for row in rows), 512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studies/results/unlearning"))
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning"))
    parser.add_argument("--record", type=Path, help="one file for all results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a wrecked model is full of them, and ten times as slow
    study = TinyStudy(SETTING, given.out, given.work)
    print(table(study.all()))
    if given.record:
        study.record(
            given.record, command="python -m benchmarks.unlearning_study", docs=DOCS, memorise_epochs=MEMORISE_EPOCHS
        )


if __name__ == "__main__":
    main()
