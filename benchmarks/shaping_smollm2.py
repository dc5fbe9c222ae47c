"""SmolLM2-135M-Instruct on a reward that is earned word by word: paid at the end, by Shapley values, or by a mix.

    python -m benchmarks.shaping_smollm2 --model MODEL.gguf --out runs/shaping-smollm2 [--minutes 40] [--record]

The policy explains a thing in 16 tokens; the reward is the share of its words that are short, each counted once. Things
of the test are in no training prompt. Every arm takes `STEPS` updates of the recipe `shaping/smollm2-shap-bo`; the
third arm's mix is found by the inner runs of `SEARCH`, which count. A finished run is a line of OUT/runs.jsonl and is
not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from benchmarks.shaping_runs import arguments, fit, read, watch
from lit_reason.rewards.dialogue import Dialogue

ARMS = {"sparse": ("final",), "shap": ("shap",), "mix": ("final", "uniform", "shap")}
SEEDS, STEPS, EVERY, RATE = (0,), 20, 10, 1e-3
SEARCH = {"trials": 3, "initial": 2, "rounds": 8, "final_rounds": STEPS, "reruns": 0, "kl": 0.0}
TRAIN = (
    "rain bread gravity music money sleep a river a lighthouse electricity paper friendship an engine glass "
    "a library winter salt democracy a bicycle coffee dreams a calendar medicine fire a bridge"
)
SEARCHED = "snow a bank honey light a mountain patience television a garden sugar a passport thunder history"
TEST = "wind a school cheese magnetism a forest courage a telephone a hospital cotton a recipe earthquakes language"
SHORT, LEAST_WORDS, ANSWER, SAMPLES = 4, 8, 16, 3
# The chat template of SmolLM2 without its system prompt, which would be most of every prompt here.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def short_words(dialogue: Dialogue) -> float:
    """Different words of at most `SHORT` letters, as a share of all words of the answer or of `LEAST_WORDS`."""
    words = re.findall(r"[a-z]+", dialogue.turns[-1].text.lower())
    return len({word for word in words if len(word) <= SHORT}) / max(len(words), LEAST_WORDS)


def things(listed: str) -> list[str]:
    """Nouns, with their articles."""
    return re.findall(r"(?:an? )?\w+", listed)


@dataclass(frozen=True)
class Run:
    """One training run, or one whole search."""

    arm: str
    seed: int


def prepare(folder: Path) -> None:
    """Write prompts and template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "template.jinja").write_text(TEMPLATE)
    for name, listed in (("train", TRAIN), ("val", f"{SEARCHED} {TEST}")):
        rows = [{"prompt": f"What is {thing}?"} for thing in things(listed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(run: Run, folder: Path, model: str) -> list[str]:
    """Options of `fit`, over those of the recipe."""
    given: dict[str, Any] = {
        "seed_everything": run.seed,
        "data.seed": run.seed,
        "model.sampling.seed": run.seed,
        "model.lm.path": model,
        "model.lm.chat_template": str(folder / "template.jinja"),
        "model.optim.lr": RATE,
        "model.policy.kl": 0.0,
        "model.credit.rule": "turn_rtg",
        "model.credit.scale": "none",
        "model.shaping.explainers": json.dumps(ARMS[run.arm]),
        "model.attribution.players": "token",
        "model.dialogue.turn_tokens": ANSWER,
        "model.dialogue.answer_tokens": ANSWER,
        "data.rewards": json.dumps({"benchmarks.shaping_smollm2:short_words": 1.0}),
        "data.train_file": str(folder / "train.jsonl"),
        "data.val_file": str(folder / "val.jsonl"),
        "data.batch_rows": 2,
        "data.val_count": len(things(f"{SEARCHED} {TEST}")),
        "trainer.enable_progress_bar": "false",
    }
    search = {**SEARCH, "seed": run.seed} if len(ARMS[run.arm]) > 1 else None
    return arguments(given, search, STEPS, folder / "work" / f"{run.arm}-{run.seed}")


def tested(model: Any) -> dict[str, Any]:
    """Mean score of each test prompt, and an answer to each."""
    from lit_reason.regimes.shaping.held_out import halves
    from lit_reason.regimes.shaping.token_rewards import answer

    tasks = halves(model._data.tasks["val"], "test")
    sampling = dataclasses.replace(model.sampling, seed=99)
    player = model.player(sampling, dataclasses.replace(model.dialogue, group=SAMPLES))
    rollouts = player.play(tasks, policy_version=model.trainer.global_step)
    scores = model.token_rewards.scores(rollouts, tasks)
    by_prompt = [[s for t, s in zip(rollouts, scores, strict=True) if t.prompt == i] for i in range(len(tasks))]
    first = {t.prompt: t for t in reversed(rollouts)}
    said = [model.text_of(t.ids[slice(*answer(t))]) for _, t in sorted(first.items())]
    return {"scores": [statistics.fmean(own) for own in by_prompt], "said": said}


def train(run: Run, folder: Path, model: str) -> dict[str, Any]:
    """Train, and what came of it."""
    seen = watch(tested, EVERY, first=True, told=True)
    trained, found = fit("shaping/smollm2-shap-bo", options(run, folder, model), seen)
    trials = [asdict(trial) for trial in trained.inner.trials()] if trained.inner is not None else []
    return {**asdict(run), **found, "trials": trials}


def interval(values: list[float]) -> list[float]:
    """Mean over test prompts, and half the width of Student's 95 % interval."""
    t = 2.201  # 12 prompts
    assert len(values) == 12
    return [statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5]


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Score on the test prompts by update, its distance to the sparse arm's, and the costs, of each run."""
    sparse = {r["seed"]: r for r in done if r["arm"] == "sparse"}
    rows = {}
    for run in done:
        checks = {c["step"]: c for c in run["checks"]}
        row: dict[str, Any] = {"test": {at: interval(c["scores"]) for at, c in checks.items()}}
        if (base := sparse.get(run["seed"])) is not None and base is not run:
            pairs = {c["step"]: zip(checks[c["step"]]["scores"], c["scores"], strict=True) for c in base["checks"]}
            row["over_sparse"] = {at: interval([a - b for a, b in pair]) for at, pair in pairs.items()}
        final = [s["reward"] for s in run["steps"] if s["final"]]
        row["training"] = [statistics.fmean(final[i : i + EVERY]) for i in range(0, len(final), EVERY)]
        row |= {"updates": len(run["steps"]), "calls": run["steps"][-1]["calls"], "cpu": run["steps"][-1]["cpu"]}
        row |= {"weights": run["weights"], "trials": run["trials"]}
        row["said"] = {at: checks[at]["said"][:3] for at in (0, STEPS)}
        rows[f"{run['arm']} {run['seed']}"] = row
    return rows


def main() -> None:
    """Run what is missing, as far as the time goes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.out)
    path, until = args.out / "runs.jsonl", time.monotonic() + 60 * args.minutes
    for run in (Run(arm, seed) for seed in SEEDS for arm in ARMS):
        have = {(r["arm"], r["seed"]) for r in read(path)}
        if time.monotonic() < until and (run.arm, run.seed) not in have:
            found = train(run, args.out, args.model)
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
    table = summary(read(path))
    print(json.dumps(table, indent=1))
    if args.record:
        settings = {"rate": RATE, "steps": STEPS, "search": SEARCH, "tokens": ANSWER, "samples": SAMPLES}
        notes = ["CPU seconds of the process, tests included; other programs ran on the machine"]
        record("shaping-smollm2", {"settings": settings, "runs": table}, notes)


if __name__ == "__main__":
    main()
