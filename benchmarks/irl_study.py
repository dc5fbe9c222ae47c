"""Study: does a reward learnt from demonstrations alone help? A planted reward in a language that can be counted.

An answer is three of four letters, so each prompt has 64 of them; the planted reward counts two bigrams, others for
each prompt, and the expert is proportional to its exponential. Every figure is therefore exact: the divergence from the
expert, the true reward of the policy, the accuracy of the learned reward. `noisy` replaces 30 % of the demonstrations
by random letters. Every arm begins from a policy that knows the form of an answer and nothing else, and makes as many
optimizer steps.

    python -m benchmarks.irl_study [--out FILE] [--folder FOLDER] [--seeds 0 1 2 3 4] [--arms ARM ...]

Runs that the output file holds already are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.record import machine, versions
from lit_reason.cli.reason_cli import build
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.losses.preference import pair_loss
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.regimes.irl.answers import answer_logps, pair_pack
from lit_reason.tasks.student import END, StudentConfig, write_student

LETTERS, LENGTH, PROMPTS = 4, 3, 4
DEMONSTRATIONS, NOISE, STRENGTH = 2000, 0.3, 2.0
BETA = 1.0  # of implicit rewards: below 1/2 rounds overshoot, as the theory of docs/regimes/irl.md says
KL = 2.0  # rewards come out with a deviation near 0.45: beta, its product with this, is near 1
ROUNDS, REWARD_STEPS, POLICY_STEPS, BATCH, PAIRS = 3, 60, 40, 16, 512
STEPS = ROUNDS * (REWARD_STEPS + POLICY_STEPS)
WORDS = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))
RATES = {"sft": 2e-3, "implicit": 3e-4, "irft-linear": 1e-4, "reward": 1e-3, "policy": 1e-3}
ARMS = ("sft", "spin", "irft-linear", "dpo-same-pairs", "irl-bt", "irl-linear", "dpo-true")


class Language:
    """The planted reward, the expert, and what can be counted of a model.

    Args:
        seed: of the bigrams and of what is drawn.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"bigrams {seed}")
        self.reward_PY = torch.zeros(PROMPTS, len(WORDS), dtype=torch.float64)
        for p in range(PROMPTS):
            for a, b in rng.sample(list(itertools.product(range(LETTERS), repeat=2)), 2):
                for k in range(LENGTH - 1):
                    self.reward_PY[p] += (WORDS[:, k] == a) & (WORDS[:, k + 1] == b)
        self.expert_PY = (STRENGTH * self.reward_PY).softmax(1)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed + 1000)
        drawn = torch.randint(len(WORDS), (PROMPTS, 4000, 2), generator=generator)
        reward = self.reward_PY.gather(1, drawn.flatten(1)).view(PROMPTS, -1, 2)
        differ = [
            (p, *pair) for p in range(PROMPTS) for pair in drawn[p][reward[p, :, 0] > reward[p, :, 1]][:250].tolist()
        ]
        self.held_out = torch.tensor(differ)  # prompt, better answer, worse answer

    def demonstrations(self, noise: float) -> list[tuple[int, int]]:
        """Prompts and answers, as many of each prompt."""
        generator = torch.Generator().manual_seed(self.seed)
        each = DEMONSTRATIONS // PROMPTS
        drawn = torch.multinomial(self.expert_PY, each, replacement=True, generator=generator)
        random_ = torch.randint(len(WORDS), drawn.shape, generator=generator)
        bad = torch.rand(drawn.shape, generator=generator) < noise
        return [(p, int(y)) for p in range(PROMPTS) for y in torch.where(bad, random_, drawn)[p]]

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """Tokens of every prompt with every answer and its end, `[prompts, answers, tokens]`."""
        letters = torch.tensor(tokenizer.convert_tokens_to_ids([f" {'abcde'[i]}" for i in range(LETTERS)]))
        end = torch.tensor([[tokenizer.convert_tokens_to_ids(END)]]).expand(len(WORDS), 1)
        rows = []
        for p in range(PROMPTS):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"p{p}"}], tokenize=False, add_generation_prompt=True
            )
            asked = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]).expand(len(WORDS), -1)
            rows.append(torch.cat([asked, letters[WORDS], end], 1))
        return torch.stack(rows)

    @torch.no_grad()
    def logp(self, lm: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
        """Log-probability of every answer to every prompt, `float64 [prompts, answers]`."""
        training = lm.training
        lm.eval()
        flat = ids.flatten(0, 1)
        logits = lm.hf(input_ids=flat).logits.double().log_softmax(-1)
        lm.train(training)
        start = flat.shape[1] - LENGTH - 1
        return logits[:, start - 1 : -1].gather(2, flat[:, start:, None])[..., 0].sum(1).view(ids.shape[:2])

    def figures(self, lm: LanguageModel, ids: torch.Tensor, score_PY: torch.Tensor | None) -> dict[str, float]:
        """Exact figures of a policy, and how well a reward ranks held-out answers."""
        logp_PY = self.logp(lm, ids)
        share_PY = logp_PY.exp()
        found = {
            "kl": float((self.expert_PY * (self.expert_PY.log() - logp_PY)).sum(1).mean()),
            "true_reward": float((share_PY * self.reward_PY).sum(1).mean()),
            "valid": float(share_PY.sum(1).mean()),
        }
        if score_PY is not None:
            p, better, worse = self.held_out.T
            gap = score_PY[p, better] - score_PY[p, worse]
            found["held_out_accuracy"] = float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())
        return found


class Watch(Callback):
    """Figures after each round."""

    def __init__(self, language: Language, ids: torch.Tensor, first_PY: torch.Tensor) -> None:
        self.language, self.ids, self.first_PY, self.rounds = language, ids, first_PY, []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if hasattr(pl_module, "reward"):
            flat = self.ids.flatten(0, 1)
            lengths = torch.full((len(flat),), flat.shape[1])
            edges = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
            positions = torch.arange(flat.shape[1]).repeat(len(flat))
            pl_module.reward.lm.eval()
            with torch.no_grad():
                score = pl_module.reward(flat.flatten(), positions, edges).double().view(self.ids.shape[:2])
            pl_module.reward.lm.train()
        else:
            score = self.language.logp(pl_module.lm, self.ids) - self.first_PY
        self.rounds.append(self.language.figures(pl_module.lm, self.ids, score))


def options(arm: str, folder: Path, seed: int) -> list[str]:
    """Command-line settings of an arm."""
    explicit = arm.startswith("irl")
    steps = (REWARD_STEPS, POLICY_STEPS) if explicit else (REWARD_STEPS + POLICY_STEPS, 0)
    chosen: dict[str, Any] = {
        "model": "IRLRegime",
        "model.lm.path": folder / "start",
        "model.optim.lr": RATES["policy"] if explicit else RATES.get(arm, RATES["implicit"]),
        "model.sampling.max_new_tokens": LENGTH + 1,
        "model.sampling.batch_size": 256,
        "model.sampling.seed": seed,
        "model.rounds.prompts": PAIRS,
        "model.rounds.reward_steps": steps[0],
        "model.rounds.policy_steps": steps[1],
        "model.rounds.probe": 64,
        "model.reward.loss": "linear" if "linear" in arm else "sigmoid",
        "model.policy.kl": KL if explicit else 0.0,
        "data": "DemonstrationData",
        "data.train_file": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.batch_rows": BATCH,
        "data.max_length": 32,
        "trainer.max_epochs": ROUNDS,
    }
    if explicit:
        chosen |= {"model.reward.lr": RATES["reward"], "model.reward.start": "warm", "model.rounds.max_round_kl": 2.0}
        chosen |= {"model.reward.chi2": 0.1} if "linear" in arm else {}
    else:
        chosen |= {"model.reward.model": "policy", "model.reward.beta": BETA}
    if arm in ("spin", "irft-linear"):
        chosen |= {"model.reward.replay": "last"}
    if arm == "dpo-same-pairs":  # pairs of the first round, the first policy as reference: one long first round of SPIN
        chosen |= {"model.reward.reference": "initial", "model.rounds.reward_steps": STEPS, "trainer.max_epochs": 1}
    return [f"--{name}={value}" for name, value in chosen.items()] + common(folder, seed)


def common(folder: Path, seed: int) -> list[str]:
    """Settings of every run."""
    quiet = {"enable_progress_bar": "false", "enable_model_summary": "false", "enable_checkpointing": "false"}
    settings = {"accelerator": "cpu", "log_every_n_steps": 10, "gradient_clip_val": 1.0, **quiet}
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder / 'runs'}"]
    return [f"--seed_everything={seed}", *(f"--trainer.{name}={value}" for name, value in settings.items()), *logger]


def sft(folder: Path, path: Path, rate: float, steps: int, seed: int, train: Path | None = None) -> Any:
    """Supervised fine-tuning, on the demonstrations unless another file is given."""
    chosen = {
        "model": "SFTRegime",
        "model.lm.path": path,
        "model.optim.lr": rate,
        "data": "TraceData",
        "data.train_file": train or folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.batch_rows": 2 * BATCH,
        "data.max_length": 32,
        "trainer.max_steps": steps,
    }
    cli = build("fit", [f"--{name}={value}" for name, value in chosen.items()] + common(folder, seed))
    cli.run_verb()
    return cli.model.lm


def true_dpo(language: Language, lm: LanguageModel, tokenizer: Any, ids: torch.Tensor, seed: int) -> None:
    """The upper line: preferences by the planted reward itself, over answers of the first policy, as many pairs."""
    from lit_reason.data.pair_buffer import Pair

    generator = torch.Generator().manual_seed(seed)
    first_PY = language.logp(lm, ids)
    drawn = torch.multinomial(first_PY.exp(), 2 * ROUNDS * PAIRS // PROMPTS, replacement=True, generator=generator)
    pairs, prompt = [], ids.shape[2] - LENGTH - 1
    for p in range(PROMPTS):
        for a, b in drawn[p].view(-1, 2).tolist():
            gap = STRENGTH * (language.reward_PY[p, a] - language.reward_PY[p, b])
            if torch.rand((), generator=generator) > gap.sigmoid():
                a, b = b, a
            row = ids[p].numpy()
            pairs.append(
                (Pair(p, 0, row[a, :prompt], row[a, prompt:], row[b, prompt:]), first_PY[p, a], first_PY[p, b])
            )
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATES["implicit"], weight_decay=0.0)
    for _ in range(STEPS):
        chosen = [pairs[i] for i in torch.randint(len(pairs), (BATCH,), generator=generator).tolist()]
        now = answer_logps(lm, pair_pack([pair for pair, *_ in chosen])).view(-1, 2)
        before = torch.tensor([[a, b] for _, a, b in chosen])
        loss = pair_loss(*(now - before).float().T, beta=BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()


def run(arm: str, noise: float, seed: int, folder: Path) -> dict[str, Any]:
    """One arm on one seed: figures of the start, and after each round."""
    folder = folder / f"noise-{noise:g}-seed-{seed}"
    language = Language(seed)
    if not (folder / "start").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        written(folder / "train.jsonl", language.demonstrations(noise), seed)
        words = [*(f"p{p}" for p in range(PROMPTS)), *(f" {'abcde'[i]}" for i in range(LETTERS))]
        write_student(folder / "base", words, StudentConfig(context=64), seed=seed)
        form = [
            (p, int(y))
            for p in range(PROMPTS)
            for y in torch.randint(len(WORDS), (500,), generator=torch.Generator().manual_seed(seed))
        ]
        start = sft(folder, folder / "base", 1e-2, 40, seed, written(folder / "form.jsonl", form, seed))
        start.hf.save_pretrained(folder / "start")
        load_tokenizer(ModelConfig(path=str(folder / "base"))).save_pretrained(folder / "start")
    config = ModelConfig(path=str(folder / "start"))
    tokenizer, lm = load_tokenizer(config), LanguageModel.load(config)
    ids = language.ids(tokenizer)
    first_PY = language.logp(lm, ids)
    begun = time.process_time()
    watch = Watch(language, ids, first_PY)
    if arm == "sft":
        lm = sft(folder, folder / "start", RATES["sft"], STEPS, seed)
        watch.rounds.append(language.figures(lm, ids, None))
    elif arm == "dpo-true":
        true_dpo(language, lm, tokenizer, ids, seed)
        watch.rounds.append(language.figures(lm, ids, language.logp(lm, ids) - first_PY))
    else:
        cli = build("fit", options(arm, folder, seed))
        cli.trainer.callbacks.insert(0, watch)
        cli.run_verb()
    cost = round(time.process_time() - begun, 1)
    start = language.figures(LanguageModel.load(config), ids, None)
    return {"arm": arm, "noise": noise, "seed": seed, "start": start, "rounds": watch.rounds, "cpu_s": cost}


def written(path: Path, shown: list[tuple[int, int]], seed: int) -> Path:
    """A file of prompts and answers, in random order."""
    random.Random(seed).shuffle(shown)
    lines = []
    for p, y in shown:
        answer = "".join(f" {'abcde'[i]}" for i in WORDS[y].tolist())
        turns = [{"role": "user", "content": f"p{p}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studies/results/irl.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/irl-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, NOISE])
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    known = {(r["arm"], r["noise"], r["seed"]) for r in done}
    for seed, noise, arm in itertools.product(args.seeds, args.noise, args.arms):
        if (arm, noise, seed) in known:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            done.append(run(arm, noise, seed, args.folder))
        record = {
            "command": "python -m benchmarks.irl_study",
            "versions": versions(),
            "machine": machine(),
            "runs": done,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(args.out) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")
        last = done[-1]["rounds"][-1]
        print(arm, noise, seed, {k: round(v, 3) for k, v in last.items()}, done[-1]["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
