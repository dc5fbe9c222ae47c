"""Study: SmolLM2-135M-Instruct learns a reward from short solutions of GSM8K. Does it learn substance or style?

    python -m benchmarks.irl_smollm2 --gsm8k train.jsonl --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/irl-smollm2

Every step is a command of the product, as a user would type it, and leaves its files in OUT; what is there is not made
again. Demonstrations are the shortest solutions, without calculator marks. Held-out pairs set the solution of a problem
that is not among them against a worse answer, of one of three kinds: `sampled`, a wrong answer of the untouched model,
up to its last full sentence where it was cut off; `numbers`, the same solution with the results of its calculations
replaced by other numbers of as many digits; `swapped`, the solution of another problem.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from lit_reason.core.metrics_log import read_metrics
from lit_reason.data.config import RenderConfig
from lit_reason.data.packing import pack_rows
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import TokenRow
from lit_reason.metrics.intervals import wilson
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.regimes.irl.held_out import read_pairs
from lit_reason.regimes.irl.watch import FIGURES, accuracy
from lit_reason.rewards.checkers import get_checker

HELD_OUT, PROBLEMS = 160, 50  # problems of the pairs; of them, those that policies answer
QUESTION, SOLUTION = 150, 120  # most characters
HEADS = 20  # untrained heads
ROUND_FIGURES = set(FIGURES) - {"reward_loss", "pair_accuracy", "margin", "resting"}
KINDS = ("sampled", "numbers", "swapped")
WATCHED = ("sampled", "numbers")  # after every round; the third once, by `evaluate`
RECIPE, LIKELIHOOD = "recipes/irl/smollm2-gsm8k.yaml", "recipes/sft/smollm2-gsm8k.yaml"
COMMAND = "python -m benchmarks.irl_smollm2 --gsm8k train.jsonl --model SmolLM2-135M-Instruct"
MARK = re.compile(r"<<[^<>]*>>")
SENTENCES = re.compile(r"(?:.*[.!?\n])?", re.DOTALL)
RESULT = re.compile(r"<<[^<>]*>>\s*(\d[\d,]*\.?\d*)")
SIZE = {
    "data.batch_rows": 4,
    "data.max_length": 256,
    "model.rounds.prompts": 32,
    "model.rounds.reward_steps": 16,
    "model.rounds.policy_steps": 3,
    "model.rounds.probe": 16,
    "model.reward.lr": 5e-4,
    "model.reward.check_every": 0,
    "model.optim.lr": 3e-4,
    "model.sampling.max_new_tokens": 80,
    "trainer.max_epochs": 2,
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file, whole or not at all."""
    with complete_or_absent(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def other_number(text: str, rng: random.Random) -> str:
    """Another number with as many digits; points and commas stay."""
    while True:
        digits = iter([rng.choice("123456789"), *(rng.choice("0123456789") for _ in text)])
        found = "".join(next(digits) if c.isdigit() else c for c in text)
        if found != text:
            return found


def corrupted(solution: str, rng: random.Random) -> str:
    """A solution with calculator marks, in which every result is another number, and the answer the last of them."""
    last = ""

    def spoil(match: re.Match[str]) -> str:
        nonlocal last
        last = other_number(match[1], rng)
        return last

    steps, _, answer = solution.rpartition("####")
    spoilt = RESULT.sub(spoil, steps)
    answer = answer.strip()
    same_form = re.sub(r"\d", "0", last) == re.sub(r"\d", "0", answer) and last != answer
    return f"{MARK.sub('', spoilt)}#### {last if same_form else other_number(answer, rng)}"


def prepare(gsm8k: Path, out: Path) -> None:
    """Demonstrations, and the problems that are held out."""
    if (out / "train.jsonl").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    short = [
        r
        for r in rows(gsm8k)
        if len(r["question"]) <= QUESTION and len(MARK.sub("", r["answer"])) <= SOLUTION and RESULT.search(r["answer"])
    ]
    random.Random(0).shuffle(short)
    plain = [{**r, "answer": MARK.sub("", r["answer"])} for r in short]
    written(out / "marked.jsonl", short[:HELD_OUT])
    written(out / "held.jsonl", plain[:HELD_OUT])
    written(out / "problems.jsonl", plain[:PROBLEMS])
    written(out / "train.jsonl", plain[HELD_OUT:])


def command(out: Path, name: str, *arguments: str) -> Path:
    """Run a verb of the product into the folder `name`, unless it is there; what it said and cost is kept beside it."""
    folder = out / name
    if (folder / "cost.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    logger = {"logger": "CSVLogger", "logger.save_dir": out, "logger.name": name, "logger.version": "run"}
    line = [*arguments, *options({f"trainer.{k}": v for k, v in logger.items()})]
    begun, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "said.txt").open("w") as said:
        done = subprocess.run([sys.executable, "-m", "lit_reason", *line], stdout=said, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"lit-reason {' '.join(line)}\nfailed: see {folder / 'said.txt'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder / "cost.json").write_text(json.dumps({"cpu_s": round(cpu), "wall_s": round(time.time() - begun)}))
    return folder


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    return [f"--{name}={value}" for name, value in settings.items()]


def model_at(path: Path | str, out: Path) -> list[str]:
    """Options that begin with a model, and keep tokens in the study's folder."""
    return options({"model.lm.path": path, "data.cache_dir": out / "cache"})


def pairs(model: Path | str, out: Path) -> None:
    """The pairs of every kind, of the same problems in the same order: those that the untouched model got wrong."""
    given = {"data.predict_file": out / "held.jsonl", "data.train_file": "null", "data.pairs_file": "null"}
    given |= {"model.sampling.max_new_tokens": 80, "model.sampling.batch_size": 64}
    folder = command(out, "answers", "predict", "--config", RECIPE, *model_at(model, out), *options(given))
    if (out / "swapped.jsonl").is_file():
        return
    check, rng, found = get_checker("numeric"), random.Random(1), []
    answers = {r["prompt"]: r for r in rows(folder / "run" / "predictions.jsonl")}
    counts = {"answers": len(answers), "ended": sum(r["ended"] for r in answers.values()), "right": 0}
    for gold in rows(out / "marked.jsonl"):
        answer = answers[gold["question"]]
        text = answer["completion"] if answer["ended"] else SENTENCES.match(answer["completion"])[0]
        right = check(answer["completion"], answer["answer"]).correct or check(text, answer["answer"]).correct
        counts["right"] += right
        if text.strip() and not right:
            found.append((gold, text))
    (out / "pairs.json").write_text(json.dumps({**counts, "pairs": len(found)}))
    solutions = [MARK.sub("", gold["answer"]) for gold, _ in found]
    worse = {
        "sampled": [text for _, text in found],
        "numbers": [corrupted(gold["answer"], rng) for gold, _ in found],
        "swapped": solutions[1:] + solutions[:1],
    }
    for kind, answers_ in worse.items():
        lines = zip(found, solutions, answers_, strict=True)
        written(
            out / f"{kind}.jsonl", [{"prompt": g["question"], "chosen": s, "rejected": w} for (g, _), s, w in lines]
        )


def train(name: str, start: Path | str, out: Path) -> Path:
    """Rounds of the recipe from a model, with the accuracy on every kind of pair after each."""
    kinds = json.dumps({kind: str(out / f"{kind}.jsonl") for kind in WATCHED})
    given = {**SIZE, "data.train_file": out / "train.jsonl", "data.pairs_file": kinds}
    given |= {"trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": "false"}
    return command(out, name, "fit", "--config", RECIPE, *model_at(start, out), *options(given))


def judge(name: str, reward: Path | str, start: Path | str, out: Path) -> Path:
    """`lit-reason evaluate` of a reward on the kinds of pairs that were not watched."""
    given = {"model.reward.path": reward, "data.max_length": 256, "data.train_file": "null"}
    given["data.pairs_file"] = json.dumps({kind: str(out / f"{kind}.jsonl") for kind in KINDS if kind not in WATCHED})
    return command(out, name, "evaluate", "--config", RECIPE, *model_at(start, out), *options(given))


def policy(name: str, path: Path | str, out: Path) -> Path:
    """Loss of a policy on the held-out solutions, and how many of the first problems it answers rightly (greedy)."""
    callback = {"class_path": "VerifiedGeneration", "init_args": {"limit": PROBLEMS}}
    callback["init_args"] |= {"sampling": {"temperature": 0.0, "max_new_tokens": 80, "batch_size": 50}}
    given = {"data.val_file": out / "problems.jsonl", "data.holdout": 0, "model.lm.adapter": "null"}
    given |= {"trainer.callbacks": json.dumps([callback])}
    return command(out, name, "validate", "--config", LIKELIHOOD, *model_at(path, out), *options(given))


# ---- what a sceptic asks for ----


@torch.no_grad()
def baselines(model: Path, out: Path) -> dict[str, Any]:
    """Accuracy on the watched pairs of length, likelihood under the untouched model, and rewards untrained."""
    path = out / "baselines.json"
    if path.is_file():
        return json.loads(path.read_text())
    config = ModelConfig(path=str(model))
    tokenizer, lm = load_tokenizer(config), LanguageModel.load(config).eval()
    renderer = Renderer(tokenizer, RenderConfig())
    head_DH = torch.randn(lm.head.weight.shape[1], HEADS, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    known: dict[bytes, dict[str, torch.Tensor]] = {}  # the same solution is in pairs of every kind
    for kind in WATCHED:
        files = {kind: str(out / f"{kind}.jsonl")}
        held = read_pairs(files, renderer, max_length=256, limit=HELD_OUT, max_bad_rows=0)
        for row in (row for pair in held for row in (pair.chosen, pair.rejected)):
            if row.ids.tobytes() not in known:
                known[row.ids.tobytes()] = _figures(lm, row, head_DH)
        scores = [(known[pair.chosen.ids.tobytes()], known[pair.rejected.ids.tobytes()]) for pair in held]
        margin = {name: torch.stack([a[name] - b[name] for a, b in scores]) for name in scores[0][0]}
        heads_H = accuracy(margin.pop("untrained")).mean(0)
        found[kind] = {name: rate(accuracy(m)) for name, m in margin.items()}
        found[kind]["untrained"] = {"mean": float(heads_H.mean()), "of": HEADS, "pairs": len(held)}
        found[kind]["untrained"] |= {"least": float(heads_H.min()), "most": float(heads_H.max())}
    path.write_text(json.dumps(found))
    return found


def _figures(lm: LanguageModel, row: TokenRow, head_DH: torch.Tensor) -> dict[str, torch.Tensor]:
    """Length, log-likelihood (sum, mean a token) and scores by untrained heads of one answer."""
    pack = pack_rows([row])
    hidden_TD = lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    logp_S = lm.head(hidden_TD[pack.index], pack.targets).logp_S
    likely = {"log-likelihood": logp_S.sum(), "log-likelihood a token": logp_S.mean()}
    return {"length": torch.tensor(float(len(row))), **likely, "untrained": hidden_TD[-1] @ head_DH}


def rate(right_N: torch.Tensor) -> dict[str, float]:
    """Accuracy with its 95 % Wilson interval."""
    low, high = wilson(float(right_N.sum()), len(right_N))
    return {"accuracy": float(right_N.mean()), "low": low, "high": high, "pairs": len(right_N)}


# ---- the record ----


def history(folder: Path) -> dict[str, list[Any]]:
    """Figures by round of a run of the recipe, or of one evaluation."""
    log = read_metrics(folder / "run" / "metrics.csv")
    wanted = [n for n in log.series if n.startswith("val/") or n.removeprefix("train/") in ROUND_FIGURES]
    found: dict[str, list[Any]] = {name: [v for _, v in log.points(name)] for name in sorted(wanted)}
    found["train/pair_accuracy by step"] = log.points("train/pair_accuracy")
    found["train/resting by step"] = log.points("train/resting")
    found["train/reward by step"] = log.points("train/reward")
    return {name: values for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="folder or .gguf file of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/irl-smollm2"))
    parser.add_argument("--policy", action="store_true", help="also answer problems with the policy, before and after")
    args = parser.parse_args()
    out, model = args.out.resolve(), args.model.resolve()
    torch.set_num_threads(1)
    prepare(args.gsm8k, out)
    pairs(model, out)
    steps = {"answers of the untouched policy": out / "answers", "rounds": train("rounds", model, out)}
    steps["evaluate"] = judge("evaluate", steps["rounds"] / "run" / "reward", model, out)
    found: dict[str, Any] = {"settings": SIZE, "baselines": baselines(model, out)}
    if args.policy:
        steps["policy before"] = policy("policy-before", model, out)
        steps["policy after"] = policy("policy-after", steps["rounds"] / "run" / "export", out)
    found["pairs"] = json.loads((out / "pairs.json").read_text())
    found["steps"] = {name: {**json.loads((f / "cost.json").read_text()), **history(f)} for name, f in steps.items()}
    print(record("irl_smollm2", found, command=COMMAND + " --policy" * args.policy))


if __name__ == "__main__":
    main()
