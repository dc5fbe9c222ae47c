"""C5: an optimizer step of a LLaMA of 60 M parameters, dense, low-rank and with projected gradients.

1,024 tokens in 4 rows, every token trained, float32, rank 128. A process warms up with one step, in which GaLore and
Fira decompose the gradients, and times the next ones. Only the optimizers differ between GaLore, Fira and their
published packages; the model and its loss are ours.

    python -m benchmarks.lowrank_step [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.meter import Meter, peak_mib
from benchmarks.record import record
from benchmarks.rounds import Case, compare, peer_versions, run_rounds

MODULE = "benchmarks.lowrank_step"
CASES = (
    Case("full", "dense, torch's fused AdamW", MODULE),
    Case("low-rank", "factors of rank 128, fused AdamW", MODULE),
    Case("sltrain", "factors and 3 % sparse entries, fused AdamW", MODULE),
    Case("galore", "dense, our GaLore", MODULE),
    Case("galore-torch", "dense, GaLoreAdamW of the package galore-torch", MODULE, True),
    Case("fira", "dense, our Fira", MODULE),
    Case("fira package", "dense, FiraAdamW of the package fira", MODULE, True),
)
ROWS, LENGTH, RANK, STEPS = 4, 256, 128, 4
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def optimizer_of(case: str, lm: Any) -> Any:
    """The case's optimizer over a model's parameters."""
    import torch

    from lit_reason.core.config import OptimConfig, SubspaceConfig
    from lit_reason.core.optim import build_optimizer, hidden_matrices

    module = torch.nn.Module()
    module.lm = lm
    if case in ("galore-torch", "fira package"):
        matrices = hidden_matrices(module)
        taken = {id(p) for p in matrices}
        plain = {"params": [p for p in lm.parameters() if id(p) not in taken]}
        projected = {"params": matrices, "rank": RANK, "update_proj_gap": 200, "proj_type": "std"}
        if case == "fira package":
            from fira import FiraAdamW

            return FiraAdamW([plain, {**projected, "alpha": 0.25}], lr=1e-3, no_deprecation_warning=True)
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW([plain, {**projected, "scale": 0.25}], lr=1e-3, no_deprecation_warning=True)
    name: Any = case if case in ("galore", "fira") else "adamw"
    return build_optimizer(module, OptimConfig(optimizer=name, lr=1e-3, subspace=SubspaceConfig(rank=RANK)))


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a state, also of those that a projector object holds."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_of(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_of(v) for v in value)
    return bytes_of(vars(value)) if hasattr(value, "__dict__") else 0


def run_case(case: str, threads: int) -> dict[str, float]:
    """Some steps in this process.

    Returns:
        CPU and wall seconds of a step (median), of the first one, and megabytes (10^6) of optimizer state and weights.
    """
    import torch

    from lit_reason.models.config import LowRankConfig, ModelConfig
    from lit_reason.models.language_model import LanguageModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    density = 0.03 if case == "sltrain" else 0.0
    lowrank = LowRankConfig(rank=RANK, sparse_density=density) if case in ("low-rank", "sltrain") else None
    lm = LanguageModel.load(ModelConfig(config=SHAPE, dtype="float32", lowrank=lowrank))
    optimizer = optimizer_of(case, lm)
    tokens = ROWS * LENGTH
    positions = torch.arange(LENGTH).repeat(ROWS)
    boundaries = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32)
    rows = torch.arange(tokens)[positions < LENGTH - 1]
    meter, laps = Meter(), []
    for _ in range(1 + STEPS):
        ids = torch.randint(SHAPE["vocab_size"], (tokens,))
        meter.restart()
        loss = lm(ids, positions, boundaries, rows, ids[rows + 1], torch.full((len(rows),), 1 / len(rows))).loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        laps.append(meter.lap())
    return {
        "step_cpu_s": statistics.median(lap["cpu_s"] for lap in laps[1:]),
        "step_wall_s": statistics.median(lap["wall_s"] for lap in laps[1:]),
        "first_step_cpu_s": laps[0]["cpu_s"],
        "optimizer_mb": bytes_of(list(optimizer.state.values())) / 1e6,
        "weights_mb": sum(bytes_of(p.data) for p in lm.parameters()) / 1e6,
        "peak_mib": peak_mib(),
    }


def main() -> None:
    """Measure all cases in alternating rounds, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=[case.name for case in CASES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.threads)))
        return
    runs = run_rounds(CASES, options.rounds, lambda _: [], options.threads)
    keys = ("step_cpu_s", "step_wall_s", "optimizer_mb", "weights_mb", "first_step_cpu_s", "peak_mib")
    result = {"threads": options.threads, "cases": compare(runs, CASES, "full", keys), "peers": peer_versions()}
    print(record("lowrank_step", result, ["targets: step_cpu_s at most 0.9, optimizer_mb at most 0.45 of full"]))


if __name__ == "__main__":
    main()
