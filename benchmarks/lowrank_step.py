"""C5: an optimizer step of a LLaMA of 60 M parameters, dense, low-rank and with projected gradients.

512 tokens in 2 rows, every token trained, float32, rank 128. Each case makes one step to warm up, in which GaLore and
Fira decompose the gradients, and times the next ones; every second round goes backwards. Between GaLore, Fira and their
published packages (`galore-torch`, `fira`; left out where they are not installed) only the optimizer differs.

    python -m benchmarks.lowrank_step [--rounds 2] [--threads 1]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.meter import Meter
from benchmarks.record import record, spread, versions
from lit_reason.core.config import OptimConfig, SubspaceConfig
from lit_reason.core.optim import build_optimizer, hidden_matrices
from lit_reason.models.config import LowRankConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel

CASES = {
    "full": "dense, torch's fused AdamW",
    "low-rank": "factors of rank 128, fused AdamW",
    "sltrain": "factors and 3 % sparse entries, fused AdamW",
    "galore": "dense, our GaLore",
    "galore_torch": "dense, GaLoreAdamW of the package galore-torch",
    "our fira": "dense, our Fira",
    "fira": "dense, FiraAdamW of the package fira",
}
PACKAGES = ("galore_torch", "fira")
ROWS, LENGTH, RANK, STEPS = 2, 256, 128, 3
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
    module = torch.nn.Module()
    module.lm = lm
    if case not in PACKAGES:
        name: Any = {"galore": "galore", "our fira": "fira"}.get(case, "adamw")
        return build_optimizer(module, OptimConfig(optimizer=name, lr=1e-3, subspace=SubspaceConfig(rank=RANK)))
    matrices = hidden_matrices(module)
    taken = {id(p) for p in matrices}
    plain = {"params": [p for p in lm.parameters() if id(p) not in taken]}
    projected = {"params": matrices, "rank": RANK, "update_proj_gap": 200, "proj_type": "std"}
    if case == "fira":
        from fira import FiraAdamW

        return FiraAdamW([plain, {**projected, "alpha": 0.25}], lr=1e-3, no_deprecation_warning=True)
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW([plain, {**projected, "scale": 0.25}], lr=1e-3, no_deprecation_warning=True)


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a state, also of those that a projector object holds."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_of(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_of(v) for v in value)
    return bytes_of(vars(value)) if hasattr(value, "__dict__") else 0


def run_case(case: str) -> dict[str, float]:
    """Some steps of a new model.

    Returns:
        CPU seconds of a step (median) and of the first one, megabytes (10^6) of optimizer state and weights.
    """
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
        laps.append(meter.lap()["cpu_s"])
    return {
        "step_cpu_s": statistics.median(laps[1:]),
        "first_step_cpu_s": laps[0],
        "optimizer_mb": bytes_of(list(optimizer.state.values())) / 1e6,
        "weights_mb": sum(bytes_of(p.data) for p in lm.parameters()) / 1e6,
    }


def main() -> None:
    """Measure all cases in alternating rounds; print the table and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if case not in PACKAGES or importlib.util.find_spec(case)]
    seen: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(options.rounds):
        for case in tqdm(cases if turn % 2 == 0 else cases[::-1], desc=f"round {turn + 1} of {options.rounds}"):
            seen[case].append(run_case(case))
            gc.collect()
        result = {case: summary(seen[case], seen["full"]) | {"what": CASES[case]} for case in cases}
        facts = {"threads": options.threads, "rounds": turn + 1, "packages": versions(("galore-torch", "fira"))}
        notes = ["targets: step at most 0.9, optimizer at most 0.45 of full", "the machine ran other work too"]
        path = record("lowrank_step", {**facts, "cases": result}, notes)
    for case, row in result.items():
        shown = (
            f"{row[key]['median']:10.3f}" for key in ("step_cpu_s", "step_ratio", "optimizer_mb", "optimizer_ratio")
        )
        print(f"{case:14}{''.join(shown)}")
    print(path)


def summary(runs: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Spread of each figure over the rounds, and of time and state over those of the base, round by round."""
    found: dict[str, Any] = {key: spread([run[key] for run in runs]) for key in runs[0]}
    for name, key in (("step_ratio", "step_cpu_s"), ("optimizer_ratio", "optimizer_mb")):
        found[name] = spread([ours[key] / theirs[key] for ours, theirs in zip(runs, base, strict=True)])
    return found


if __name__ == "__main__":
    main()
