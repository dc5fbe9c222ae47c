"""C6: what the trainer costs around the model: a 4.7 M Llama, our loop against bare torch loops.

8 rows of 128 tokens a batch, all trained, float32, fused AdamW, clipping at 1. In each round, in alternating order in
one process: `ReasonTrainer.fit` with `SFTRegime`, as a recipe runs them; a bare loop over the same model and loss, that
leaves the trainer alone as the difference; and a bare loop over the plain transformers model and its own loss.

    python -m benchmarks.loop_overhead [--rounds 7] [--steps 20] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from benchmarks.chat_samples import LLAMA_5M, TINY
from benchmarks.meter import Meter
from benchmarks.record import record, spread
from benchmarks.rounds import span
from lit_reason.core.config import OptimConfig
from lit_reason.core.trainer import ReasonTrainer
from lit_reason.data.packing import Pack, pack_rows
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.regimes.sft.regime import SFTRegime

ROWS, LENGTH = 8, 128
OPTIM = OptimConfig(lr=1e-4, schedule="constant", warmup=0.0)
CLIP = 1.0
Step = dict[str, float]


def packs(vocabulary: int, count: int) -> list[Pack]:
    """Batches of random tokens, all trained but the first of each row."""
    rng = torch.Generator().manual_seed(0)

    def row() -> TokenRow:
        ids = torch.randint(3, vocabulary, (LENGTH,), generator=rng, dtype=torch.int32).numpy()
        weight = (torch.arange(LENGTH) > 0).float().numpy()
        segment = torch.full((LENGTH,), int(Segment.SOLUTION), dtype=torch.uint8).numpy()
        return TokenRow(ids, weight, segment, torch.full((LENGTH,), -1, dtype=torch.int8).numpy(), "row")

    return [pack_rows([row() for _ in range(ROWS)]) for _ in range(count)]


def trainer_steps(config: dict[str, Any], batches: list[Pack]) -> tuple[list[Step], list[float]]:
    """Seconds of each step in `ReasonTrainer`, and the losses."""
    meter, steps, losses = Meter(), [], []

    class Laps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(meter.lap())
            losses.append(float(outputs["loss"]))

    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReasonTrainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=CLIP,
            callbacks=[Laps()],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(SFTRegime(ModelConfig(config=config), OPTIM), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return steps, losses


def bare_steps(config: dict[str, Any], batches: list[Pack], *, plain: bool) -> tuple[list[Step], list[float]]:
    """The same in a loop of ten lines.

    Args:
        config: of the model.
        batches: packs of equally long rows.
        plain: run the transformers model on rows side by side, with its own loss.
    """
    L.seed_everything(0, verbose=False)
    model = LanguageModel.load(ModelConfig(config=config, attention="sdpa" if plain else "auto"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=0.0, fused=True)
    meter, steps, losses = Meter(), [], []
    for pack in batches:
        if plain:
            ids = pack.ids.view(ROWS, LENGTH)
            loss = model.hf(input_ids=ids, labels=ids).loss
        else:
            hidden = model.hidden(pack.ids, pack.positions, pack.cu_seqlens)
            loss = model.head(hidden[pack.index], pack.targets, pack.target_weight).loss_sum / pack.norm
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(meter.lap())
        losses.append(float(loss.detach()))
    return steps, losses


LOOPS: dict[str, Callable[[dict[str, Any], list[Pack]], tuple[list[Step], list[float]]]] = {
    "ReasonTrainer": trainer_steps,
    "bare loop, same model and loss": lambda config, batches: bare_steps(config, batches, plain=False),
    "bare loop, plain transformers": lambda config, batches: bare_steps(config, batches, plain=True),
}
BASE = "bare loop, same model and loss"


def measure(config: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Median seconds a step of every loop by round, ratios to the bare loops, and how far the losses differ.

    Args:
        config: of the model.
        rounds: alternating rounds.
        steps: steps a round, after two that are not timed.
    """
    batches = packs(config["vocab_size"], steps + 2)
    seen: dict[str, dict[str, list[float]]] = {name: {"cpu_s": [], "wall_s": []} for name in LOOPS}
    losses: dict[str, list[float]] = {}
    for turn in tqdm(range(rounds), desc="rounds"):
        for name in list(LOOPS)[:: 1 if turn % 2 == 0 else -1]:
            timed, losses[name] = LOOPS[name](config, batches)
            for unit, values in seen[name].items():
                values.append(statistics.median(step[unit] for step in timed[2:]))
    result: dict[str, Any] = {}
    for name, units in seen.items():
        result[name] = {unit: spread(values) for unit, values in units.items()}
        for base in (n for n in LOOPS if n.startswith("bare")):
            for unit, values in units.items():
                ratios = [a / b for a, b in zip(values, seen[base][unit], strict=True)]
                result[name].setdefault(f"ratio to {base}", {})[unit] = spread(ratios)
        gaps = [abs(a / b - 1) for a, b in zip(losses[name], losses[BASE], strict=True)]
        result[name]["largest_loss_difference"] = max(gaps)
    return result


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(TINY if options.tiny else LLAMA_5M, options.rounds, options.steps)
    print(f"{'':32}{'CPU s a step':>26}{'wall s a step':>26}{'CPU s, of ' + BASE:>46}  losses differ")
    for name, row in result.items():
        shown = f"{span(row['cpu_s']):>26}{span(row['wall_s']):>26}{span(row['ratio to ' + BASE]['cpu_s']):>46}"
        print(f"{name:32}{shown}  {row['largest_loss_difference']:.1e}")
    if not options.tiny:
        print(record("loop_overhead", {"threads": options.threads, "steps": options.steps, "loops": result}))


if __name__ == "__main__":
    main()
