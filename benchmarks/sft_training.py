"""C1: fine-tuning SmolLM2-135M on chat samples, ours against transformers' Trainer and TRL's SFTTrainer.

64 fixed samples (log-normal lengths), 8 a batch, float32, AdamW, clipping at 1, no compilation, random initial weights.
A round is one batch: every case trains the same 8 samples, from the same weights, after the same batches. Each case
runs in two processes of four batches; in the second half the order of the cases is reversed.

    python -m benchmarks.sft_training [--threads 2] [--profile]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.chat_samples import BATCH_ROWS, SMOLLM2_135M, TINY, Sample, batches_of, chat_samples, warm_up
from benchmarks.meter import Meter, peak_mib
from benchmarks.record import record, spread
from benchmarks.rounds import Case, Runs, peer_versions, run_rounds, span

CASES = (
    Case("lit_reason", "rows packed without padding, each attending to itself", "benchmarks.sft_training"),
    Case("hf padded", "transformers.Trainer, padded to the longest row", "benchmarks.peers.sft_training", True),
    Case("trl padded", "SFTTrainer, padded to the longest row", "benchmarks.peers.sft_training", True),
    Case("trl grouped", "SFTTrainer, rows of similar length batched", "benchmarks.peers.sft_training", True),
    Case("trl padding-free", "SFTTrainer, padding_free", "benchmarks.peers.sft_training", True),
)
HALVES = ((0, 7, 2, 5), (1, 6, 3, 4))  # batches by process: of those sorted by length, each half has long and short
LEARNING_RATE, CLIP = 1e-4, 1.0


def train(config: dict[str, Any], batches: list[list[Sample]], threads: int) -> dict[str, Any]:
    """Train on batches, one optimizer step each, and time every step after the first.

    Args:
        config: of the model.
        batches: lists of 8 samples; the first is for warming up.
        threads: of torch.

    Returns:
        `steps` (seconds of each timed step), `losses` of all steps, `peak_mib`, and `floor_s`: what the matrix products
        of the timed steps would take at the rate of large square ones, measured right after.
    """
    import lightning as L
    import numpy as np
    import torch
    from lightning.pytorch.loggers import CSVLogger

    from lit_reason.core.config import OptimConfig
    from lit_reason.core.trainer import ReasonTrainer
    from lit_reason.data.cache import TokenStore, write_store
    from lit_reason.data.loader import BinSampler, PackLoader
    from lit_reason.data.token_row import Segment, TokenRow
    from lit_reason.metrics.flops import matmul_rate, model_flops
    from lit_reason.models.config import ModelConfig
    from lit_reason.regimes.sft.regime import SFTRegime

    torch.set_num_threads(threads)
    meter, steps, losses = Meter(), [], []

    class Laps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            lap = meter.lap()
            if batch_idx:
                steps.append(lap)

    def row(number: int, sample: Sample) -> TokenRow:
        n = len(sample.ids)
        trained = np.arange(n) >= sample.prompt
        segment = np.where(trained, Segment.SOLUTION, Segment.PROMPT)
        ids, decile = np.array(sample.ids, np.int32), np.full(n, -1, np.int8)
        return TokenRow(ids, trained.astype(np.float32), segment.astype(np.uint8), decile, str(number))

    rows = [row(i, sample) for i, sample in enumerate(sample for batch in batches for sample in batch)]
    L.seed_everything(0, verbose=False)
    optim = OptimConfig(lr=LEARNING_RATE, schedule="constant", warmup=0.0)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), iter(rows), dict)
        store = TokenStore(Path(folder))
        order = BinSampler(
            store.lengths, store.weight_sums, batch_tokens=None, batch_rows=BATCH_ROWS, shuffle=False, accumulate=1
        )
        trainer = ReasonTrainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=CLIP,
            log_every_n_steps=1,
            callbacks=[Laps()],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        regime = SFTRegime(ModelConfig(config=config), optim)
        trainer.fit(regime, PackLoader(store, order))
    peak, cost = peak_mib(), model_flops(regime.lm.hf)
    assert cost is not None
    trained = [sum(len(s.ids) - s.prompt for s in batch) for batch in batches[1:]]
    flops = sum(cost.step([len(s.ids) for s in b], n) for b, n in zip(batches[1:], trained, strict=True))
    floor = flops / matmul_rate(torch.device("cpu"), torch.float32, 1.0)
    return {"steps": steps, "losses": losses, "peak_mib": peak, "floor_s": floor}


def work(config: dict[str, Any], which: list[int], *, by_length: bool = False) -> list[list[Sample]]:
    """The warm-up batch and those with the given numbers."""
    batches = batches_of(chat_samples(config["vocab_size"]), by_length=by_length)
    return [warm_up(config["vocab_size"]), *(batches[i] for i in which)]


def profile(config: dict[str, Any], threads: int) -> dict[str, float]:
    """Share of each operator in the time of a warm-up step and one batch of 448 tokens, largest first."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        train(config, work(config, [1]), threads)
    times = {e.key: e.self_cpu_time_total for e in profiled.key_averages()}
    whole = sum(times.values())
    return {key: time / whole for key, time in sorted(times.items(), key=lambda kv: -kv[1])[:25]}


def arguments() -> argparse.ArgumentParser:
    """Arguments of one case, ours or a peer's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=[case.name for case in CASES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="0,1", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="record where the time of our case goes instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    return parser


def summarise(runs: Runs, vocabulary: int) -> dict[str, Any]:
    """Trained tokens a second of every case over all batches, by batch, and against the others.

    Returns:
        By case: rates, memory, `speedup` of lit_reason (over all samples, and by batch where the batches are the same),
        `memory_ratio` of lit_reason, and the largest relative difference from lit_reason's losses.
    """
    result: dict[str, Any] = {}
    for case in CASES:
        halves = [f for f in runs.figures[case.name]]
        if None in halves:
            result[case.name] = {"what": case.what, "failed": runs.failures.get(case.name, "")}
            continue
        grouped = case.name == "trl grouped"
        batches = batches_of(chat_samples(vocabulary), by_length=grouped)
        order = [i for half in HALVES[: len(halves)] for i in half]
        trained = [sum(len(s.ids) - s.prompt for s in batches[i]) for i in order]
        tokens = [sum(len(s.ids) for s in batches[i]) for i in order]
        padded = [BATCH_ROWS * max(len(s.ids) for s in batches[i]) for i in order]
        through = tokens if case.name in ("lit_reason", "trl padding-free") else padded
        steps = [step for f in halves if f for step in f["steps"]]
        row: dict[str, Any] = {"what": case.what, "tokens": sum(through), "trained_tokens": sum(trained)}
        for unit in ("wall_s", "cpu_s"):
            row[unit] = sum(step[unit] for step in steps)
            row[f"trained_tokens_per_{unit}"] = sum(trained) / row[unit]
            row[f"by_batch_per_{unit}"] = [n / step[unit] for n, step in zip(trained, steps, strict=True)]
        row["peak_mib"] = spread([f["peak_mib"] for f in halves if f])
        row["losses"] = [f["losses"] for f in halves if f]
        if floors := [f["floor_s"] for f in halves if f and "floor_s" in f]:
            row["floor_s"], row["of_floor"] = sum(floors), row["wall_s"] / sum(floors)
        result[case.name] = row
    ours = result["lit_reason"]
    for name, row in result.items():
        if "failed" in row or "failed" in ours:
            continue
        row["memory_of_lit_reason"] = ours["peak_mib"]["median"] / row["peak_mib"]["median"]
        for unit in ("wall_s", "cpu_s"):
            key, by_batch = f"trained_tokens_per_{unit}", f"by_batch_per_{unit}"
            row[f"speedup_of_lit_reason_{unit}"] = ours[key] / row[key]
            row[f"speedup_by_batch_{unit}"] = spread(
                [a / b for a, b in zip(ours[by_batch], row[by_batch], strict=True)]
            )
        if name != "trl grouped":
            pairs = zip(sum(ours["losses"], []), sum(row["losses"], []), strict=True)
            row["largest_loss_difference"] = max(abs(a / b - 1) for a, b in pairs)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'':18}{'tok/s':>10}{'tok/CPU-s':>10}{'MiB':>8}  lit_reason: faster (CPU s; by batch)    memory  loss gap")
    for name, row in result.items():
        if "failed" in row:
            print(f"{name:18}{row['failed']}")
            continue
        faster = f"{row['speedup_of_lit_reason_wall_s']:.2f} ({row['speedup_of_lit_reason_cpu_s']:.2f}; "
        faster += f"{span(row['speedup_by_batch_cpu_s'])})"
        print(
            f"{name:18}{row['trained_tokens_per_wall_s']:10.1f}{row['trained_tokens_per_cpu_s']:10.1f}"
            f"{row['peak_mib']['median']:8.0f}  {faster:40}{row['memory_of_lit_reason']:6.2f}"
            f"  {row.get('largest_loss_difference', float('nan')):.1e}"
        )


def main() -> None:
    """Run one case, or all of them and write the file."""
    options = arguments().parse_args()
    config = TINY if options.tiny else SMOLLM2_135M
    if options.case:
        batches = work(config, [int(i) for i in options.batches.split(",")])
        print(json.dumps(train(config, batches, options.threads)))
        return
    if options.profile:
        shares = profile(config, options.threads)
        print(record("sft_profile", {"threads": options.threads, "shares": shares}))
        return
    tiny = ["--tiny"] if options.tiny else []
    runs = run_rounds(
        CASES, len(HALVES), lambda half: ["--batches", ",".join(map(str, HALVES[half])), *tiny], options.threads
    )
    result = summarise(runs, config["vocab_size"])
    show(result)
    if not options.tiny:
        facts = {"threads": options.threads, "peers": peer_versions(), "cases": result}
        print(record("sft_training", facts, ["random initial weights at the shapes of SmolLM2-135M"]))


if __name__ == "__main__":
    main()
