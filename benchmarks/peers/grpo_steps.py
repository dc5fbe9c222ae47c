"""C4, end to end, with TRL's GRPOTrainer: the peer of `benchmarks.grpo_steps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo_steps import (
    CLIP_NORM,
    COMPLETION_TOKENS,
    GROUP,
    LEARNING_RATE,
    PROMPTS,
    Laps,
    arguments,
    question,
    reward,
    run,
)


class Watch(TrainerCallback):
    """Laps of optimizer steps, and the lengths that the trainer logs."""

    def __init__(self) -> None:
        self.laps, self.tokens = Laps(), []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One lap a step."""
        self.laps.lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Mean length of the completions of a step."""
        if logs and "completions/mean_length" in logs:
            self.tokens.append(logs["completions/mean_length"])


def train(folder: Path, steps: int) -> dict[str, float]:
    """As `benchmarks.grpo_steps.train`.

    Args:
        folder: holds the model.
        steps: to be counted.
    """
    settings = GRPOConfig(
        output_dir=str(folder / "run"),
        max_steps=steps + 1,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=COMPLETION_TOKENS,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
    )
    watch = Watch()
    asked = [{"prompt": [{"role": "user", "content": question(i)}]} for i in range((steps + 1) * PROMPTS)]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [reward(completion[0]["content"]) for completion in completions],
        args=settings,
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[watch],
    )
    trainer.train()
    return {**watch.laps.figures(), "tokens": sum(watch.tokens) / len(watch.tokens)}


if __name__ == "__main__":
    print(json.dumps(run(train, arguments().parse_args())))
