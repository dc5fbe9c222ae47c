"""Does dense credit learn faster? Ways of paying one reward to tokens, and mixes of them found by search.

    python -m benchmarks.shaping_study --out runs/shaping-study [--minutes 40] [--record]

The policy is a 2-layer student of width 64 over 16 words; the reward is a 1-layer scorer trained on planted worths of
words and of pairs. Every arm pays the same scorer's reward, with RLOO's baseline token by token, for `STEPS` updates;
its learning rate is that of `RATES` with the highest mean reward over them on `SWEEP_SEEDS`. Mixes are found by the
inner runs of `SEARCHES`, whose cost counts. Every finished run is a line of OUT/runs.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lowrank_study import interval
from benchmarks.record import record
from benchmarks.shaping_runs import arguments, fit, read, watch

FIXED = ("final", "uniform", "attention", "prefix", "shap", "lime")
MIXED = ("final", "uniform", "attention", "shap")  # the explainers of the equal mix and of both searches
SEARCHES = {
    f"{propose} {rounds}": {"propose": propose, "rounds": rounds}
    for rounds in (4, 8)
    for propose in ("bayes", "random")
}
ARMS = (*FIXED, "equal", *SEARCHES)
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SWEEP_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
STEPS, EVERY, WINDOW = 16, 4, 5
SEARCH = {"trials": 5, "initial": 3, "reruns": 0, "kl": 0.05}
WORDS = tuple(f" w{i}" for i in range(16))
PROMPT, ANSWER = 2, 8


@dataclass(frozen=True, order=True)
class Run:
    """One training run, or one whole search."""

    arm: str
    lr: float
    seed: int


def prepare(folder: Path) -> None:
    """Write the policy's start and the scorer, once."""
    from transformers import LlamaForSequenceClassification

    from lit_reason.rewards.planted import PlantedReward
    from lit_reason.tasks.student import StudentConfig, build_model, build_tokenizer, write_student

    if (folder / "scorer/config.json").is_file():
        return
    write_student(folder / "base", WORDS)
    tokenizer = build_tokenizer(WORDS)
    small = build_model(StudentConfig(layers=1), tokenizer, seed=1)
    small.config.num_labels = 1
    torch.manual_seed(0)
    scorer = LlamaForSequenceClassification(small.config)
    first = tokenizer.convert_tokens_to_ids(WORDS[0])
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": WORDS[0] * PROMPT}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    planted = PlantedReward(len(tokenizer), pairs=0.5, skip=len(head), seed=3)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3)
    for _ in range(600):
        answers = torch.randint(first, first + len(WORDS), (64, int(torch.randint(1, ANSWER + 1, ()))))
        prompts = torch.tensor(head).expand(64, -1).clone()
        prompts[:, 1 : 1 + PROMPT] = torch.randint(first, first + len(WORDS), (64, PROMPT))
        ids = torch.cat([prompts, answers], 1)
        worth = planted(ids, torch.ones_like(ids, dtype=torch.bool)).float()
        loss = (scorer(input_ids=ids).logits[:, 0] - worth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scorer.save_pretrained(folder / "scorer")
    (folder / "scorer-loss.json").write_text(
        json.dumps({"last_squared_error": loss.item(), "variance": worth.var().item()})
    )


def options(run: Run, folder: Path) -> list[str]:
    """Options of `fit`, over those of the recipe."""
    names = (run.arm,) if run.arm in FIXED else MIXED
    given: dict[str, Any] = {
        "seed_everything": run.seed,
        "data.seed": run.seed,
        "model.sampling.seed": run.seed,
        "model.optim.lr": run.lr,
        "model.lm.path": str(folder / "base"),
        "model.reward": "ClassifierReward",
        "model.reward.path": str(folder / "scorer"),
        "model.shaping.explainers": json.dumps(names),
        "model.attribution.shapley": "permutation",
        "model.credit.scale": "none",
        "model.dialogue.turn_tokens": ANSWER,
        "model.policy.entropy": 0.02,
        "data.env.words": json.dumps(WORDS),
        "data.val_count": 32,
    }
    own = SEARCHES.get(run.arm)
    search = None if own is None else {**SEARCH, **own, "final_rounds": STEPS, "seed": run.seed}
    return arguments(given, search, STEPS, folder / "work" / f"{run.arm}-{run.lr}-{run.seed}")


def held_out(model: Any) -> dict[str, float]:
    """Score and divergence on held-out prompts, by sampling."""
    tasks = model._data.tasks["val"]
    player = model.player(dataclasses.replace(model.sampling, seed=99), dataclasses.replace(model.dialogue, group=1))
    rollouts = player.play(tasks, policy_version=model.trainer.global_step)
    scores, kls = model.token_rewards.scores(rollouts, tasks), model._kl(rollouts)
    return {"score": statistics.fmean(scores), "kl": statistics.fmean(kls)}


def train(run: Run, folder: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train, with more options where given, and what came of it."""
    seen = watch(held_out, EVERY)
    return {**asdict(run), **fit("shaping/tiny-shap-bo", [*options(run, folder), *more], seen)[1]}


def work(done: list[dict[str, Any]]) -> Iterator[Run]:
    """What is left to run: the sweep first, then all arms seed by seed."""
    have = {Run(r["arm"], r["lr"], r["seed"]) for r in done}
    sweep = [Run(arm, lr, seed) for seed in SWEEP_SEEDS for lr in RATES for arm in (*FIXED, "equal")]
    yield from (run for run in sweep if run not in have)
    for seed in SEEDS:
        for arm in ARMS:
            run = Run(arm, best_rate(done, arm), seed)
            if run not in have:
                yield run


def swept(done: list[dict[str, Any]], arm: str) -> dict[float, float]:
    """Mean reward over the sweep's runs at each rate, which speed and height both raise. Mixes take that of `equal`."""
    arm = "equal" if arm in SEARCHES else arm
    means: dict[float, list[float]] = {lr: [] for lr in RATES}
    for r in done:
        if r["arm"] == arm and r["seed"] in SWEEP_SEEDS:
            means[r["lr"]].append(statistics.fmean(s["reward"] for s in r["steps"]))
    return {lr: statistics.fmean(values) for lr, values in means.items() if values}


def best_rate(done: list[dict[str, Any]], arm: str) -> float:
    """The rate with the highest mean reward."""
    means = swept(done, arm)
    return max(means, key=lambda rate: means[rate]) if means else RATES[0]


def ended(run: dict[str, Any]) -> float:
    """Mean reward of the last `WINDOW` steps."""
    return statistics.fmean(s["reward"] for s in run["steps"][-WINDOW:])


def reached(run: dict[str, Any], goal: float) -> dict[str, float] | None:
    """Steps, CPU seconds and reward calls until the mean over `WINDOW` steps of the final run is at the goal."""
    window: list[float] = []
    for number, step in enumerate((s for s in run["steps"] if s["final"]), 1):
        window = [*window[-WINDOW + 1 :], step["reward"]]
        if len(window) == WINDOW and statistics.fmean(window) >= goal:
            search = sum(not s["final"] for s in run["steps"])
            return {"steps": number, "with_search": number + search, "cpu": step["cpu"], "calls": step["calls"]}
    return None


def score_at(run: dict[str, Any], kl: float) -> float | None:
    """Held-out score at a divergence, between the two checks around it; None where the run did not go as far."""
    checks = sorted(run["checks"], key=lambda c: c["kl"])
    for before, after in zip(checks, checks[1:], strict=False):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return before["score"] + share * (after["score"] - before["score"])
    return None


def collapsed(run: dict[str, Any]) -> bool:
    """Whether the end of the final run lost more than half of what it had gained at its best."""
    rewards = [s["reward"] for s in run["steps"] if s["final"]]
    means = [statistics.fmean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
    return max(means) - means[-1] > 0.5 * (max(means) - means[0])


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The table: of every arm over its seeds."""
    tests = {arm: [r for r in done if (r["arm"], r["lr"]) == (arm, best_rate(done, arm)) and r["seed"] in SEEDS]
             for arm in ARMS}  # fmt: skip
    every = [r for runs in tests.values() for r in runs]
    sweep = {arm: swept(done, arm) for arm in (*FIXED, "equal")}
    if not every:
        return {"swept": sweep}
    start = statistics.fmean(next(s["reward"] for s in r["steps"] if s["final"]) for r in every)
    goal = start + 0.7 * (max(statistics.fmean(map(ended, runs)) for runs in tests.values() if runs) - start)
    kl = statistics.median(r["checks"][-1]["kl"] for r in tests["final"]) if tests["final"] else 0.0
    rows = {}
    for arm, runs in tests.items():
        if not runs:
            continue
        hits = [h for r in runs if (h := reached(r, goal))]
        at_kl = [s for r in runs if (s := score_at(r, kl)) is not None]
        rows[arm] = {
            "seeds": len(runs),
            "lr": runs[0]["lr"],
            "end": interval([ended(r) for r in runs]),
            "worst": min(map(ended, runs)),
            "final_score": interval([r["checks"][-1]["score"] for r in runs]),
            "final_kl": statistics.fmean(r["checks"][-1]["kl"] for r in runs),
            "score_at_kl": [len(at_kl), statistics.fmean(at_kl) if at_kl else None],
            "reached": len(hits),
            **{
                name: statistics.median(h[name] for h in hits) if hits else None
                for name in ("steps", "with_search", "cpu", "calls")
            },
            "collapsed": sum(map(collapsed, runs)),
            "weights": [[round(w, 2) for w in r["weights"]] for r in runs] if arm in SEARCHES else None,
        }
    return {"swept": sweep, "start": start, "goal": goal, "kl": kl, "rows": rows}


def main() -> None:
    """Run what is missing, as far as the time goes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.out)
    path, until = args.out / "runs.jsonl", time.monotonic() + 60 * args.minutes
    while time.monotonic() < until:
        run = next(work(read(path)), None)
        if run is None:
            break
        found = train(run, args.out)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{run.arm:<10} lr {run.lr:g} seed {run.seed}: {ended(found):.3f}, {found['steps'][-1]['cpu']:.1f} CPU s",
            flush=True,
        )
    table = summary(read(path))
    print(json.dumps(table, indent=1))
    if args.record:
        settings = {"steps": STEPS, "search": SEARCH, "searches": SEARCHES, "mixed": MIXED, "seeds": SEEDS}
        notes = ["CPU seconds of the process; other programs ran on the machine"]
        record("shaping-study", {"settings": settings, **table}, notes)


if __name__ == "__main__":
    main()
