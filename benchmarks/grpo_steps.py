"""C4, end to end: steps of GRPO, ours against TRL's GRPOTrainer on the same task, model and batch.

A step: 4 prompts with 4 completions of at most 96 tokens at temperature 1, a reward that is a function of the text,
group advantages, one clipped update over all tokens, AdamW, clipping at 1, float32, no reference. The model has the
shapes of SmolLM2-135M and random weights, which never end a completion early; `--model FOLDER` takes a real one, whose
completions differ in length. A case runs in a process of its own; rounds alternate. The first step is not counted.

    python -m benchmarks.grpo_steps [--rounds 3] [--steps 3] [--threads 2] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chat_samples import SMOLLM2_135M, TINY
from benchmarks.meter import Meter
from benchmarks.record import record
from benchmarks.rounds import Case, case_arguments, compare, peer_versions, run_rounds

PROMPTS, GROUP, COMPLETION_TOKENS, LEARNING_RATE, CLIP_NORM = 4, 4, 96, 1e-6, 1.0
CASES = (
    Case("lit_reason", "GRPORegime in the project's trainer", "benchmarks.grpo_steps"),
    Case("trl", "GRPOTrainer, float32, without gradient checkpointing", "benchmarks.peers.grpo_steps", True),
)
TEMPLATE = (
    "{% for m in messages %}{{ m.content + (' 2 ' if m.role == 'assistant' else ' 3 ') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '4 ' }}{% endif %}"
)


def question(index: int) -> str:
    """Words that random weights and real ones can both read: numbers."""
    rng = random.Random(index)
    return " ".join(str(rng.randrange(5, 199)) for _ in range(rng.randrange(16, 48)))


def reward(text: str) -> float:
    """Something that differs between completions: the share of ones among their characters."""
    return text.count("1") / max(len(text), 1)


def write_model(folder: Path, config: Mapping[str, Any]) -> None:
    """Random weights, and a tokenizer whose words are numbers, as a folder that both sides load.

    Args:
        folder: where.
        config: of the model.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    # A padding token's embedding would begin at zero, and every norm multiply its gradient, to infinity in 30 layers.
    fields = {k: v for k, v in config.items() if k not in ("model_type", "pad_token_id")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(config["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="2", unk_token="0")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class Laps:
    """Times every step after the first."""

    def __init__(self) -> None:
        self.meter, self.steps = Meter(), []

    def lap(self) -> None:
        """One step is done."""
        self.steps.append(self.meter.lap())

    def figures(self) -> dict[str, float]:
        """Seconds a step, and steps an hour."""
        counted = self.steps[1:]
        cost = {key: sum(step[key] for step in counted) / len(counted) for key in counted[0]}
        return {**cost, "steps_an_hour": 3600 / cost["wall_s"]}


def train(folder: Path, steps: int) -> dict[str, float]:
    """Train with this project; figures of a step.

    Args:
        folder: holds the model.
        steps: to be counted.
    """
    from lightning.pytorch import Callback

    from lit_reason.cli.reason_cli import build
    from lit_reason.core.metrics_log import read_metrics
    from lit_reason.core.run_folder import run_folder

    class Watch(Callback):
        """Laps of optimizer steps."""

        def __init__(self) -> None:
            self.laps = Laps()

        def on_train_batch_end(self, *args: Any) -> None:
            """A batch is a step here."""
            self.laps.lap()

    settings = {
        "model": "GRPORegime",
        "model.lm.path": folder,
        "model.optim.lr": LEARNING_RATE,
        "model.dialogue.group": GROUP,
        "model.dialogue.max_turns": 0,
        "model.dialogue.turn_tokens": COMPLETION_TOKENS,
        "model.dialogue.answer_tokens": COMPLETION_TOKENS,
        "data": "TaskData",
        "data.env": "benchmarks.one_turn.OneTurn",
        "data.count": (steps + 1) * PROMPTS,
        "data.val_count": 0,
        "data.batch_rows": PROMPTS,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps + 1,
        "trainer.gradient_clip_val": CLIP_NORM,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder / "run",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.enable_checkpointing": "false",
    }
    cli = build("fit", [f"--{name}={value}" for name, value in settings.items()])
    watch = Watch()
    cli.trainer.callbacks.append(watch)
    cli.run_verb()
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    tokens = [value for _, value in log.points("train/sampled_tokens")]
    return {**watch.laps.figures(), "tokens": sum(tokens) / len(tokens)}


def run(make: Any, options: argparse.Namespace) -> dict[str, float]:
    """One case.

    Args:
        make: `train` of the case's module.
        options: parsed `arguments`.
    """
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.model or place)
        if not options.model:
            write_model(folder, TINY if options.tiny else SMOLLM2_135M)
        return make(folder, options.steps)


def arguments() -> argparse.ArgumentParser:
    """Arguments of the whole benchmark, and of one case, ours or the peer's."""
    parser = case_arguments(CASES, 3)
    parser.add_argument("--steps", type=int, default=3, help="steps of a case in a round, beside the first")
    parser.add_argument("--model", help="a model folder, in place of random weights")
    return parser


def main() -> None:
    """Run one case, or both in rounds and write the file."""
    options = arguments().parse_args()
    if options.case:
        print(json.dumps(run(train, options)))
        return
    same = ["--steps", str(options.steps), *(["--tiny"] if options.tiny else [])]
    same += ["--model", options.model] if options.model else []
    runs = run_rounds(CASES, options.rounds, lambda turn: same, options.threads)
    result = compare(runs, CASES, "trl", ["cpu_s", "wall_s", "steps_an_hour", "tokens"])
    if not options.tiny:
        what = Path(options.model).name if options.model else "random initial weights at the shapes of SmolLM2-135M"
        facts = {"threads": options.threads, "steps": options.steps, "peers": peer_versions(), "cases": result}
        print(record("grpo_steps", facts, [what]))


if __name__ == "__main__":
    main()
