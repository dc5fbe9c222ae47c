"""C1 with transformers' Trainer and TRL's SFTTrainer: the cases of `benchmarks.sft_training` that are not ours."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.chat_samples import BATCH_ROWS, SMOLLM2_135M, TINY, Sample
from benchmarks.meter import Meter, peak_mib
from benchmarks.sft_training import CLIP, LEARNING_RATE, arguments, work


class Laps(TrainerCallback):
    """Times every step after the first, and keeps the losses."""

    def __init__(self) -> None:
        self.meter, self.steps, self.losses = Meter(), [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One lap a step, from the end of the one before."""
        lap = self.meter.lap()
        if state.global_step > 1:
            self.steps.append(lap)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The loss as the trainer reports it."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers: trainers want one, though the samples are tokens already."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="2", unk_token="0")


def train(case: str, config: dict[str, Any], batches: list[list[Sample]], threads: int) -> dict[str, Any]:
    """As `benchmarks.sft_training.train`.

    Args:
        case: `hf padded`, or a case of TRL.
        config: of the model.
        batches: lists of 8 samples; the first is for warming up.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    set_seed(0)
    fields = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    tokenizer = number_tokenizer(config["vocab_size"])
    rows = [{"input_ids": s.ids, "labels": s.labels} for batch in batches for s in batch]
    laps = Laps()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH_ROWS,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": CLIP,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "train_sampling_strategy": "sequential",  # `trl grouped` is handed the batches sorted
        }
        if case == "hf padded":
            for row in rows:
                row["attention_mask"] = [1] * len(row["input_ids"])
            trainer: Trainer = Trainer(
                model=model,
                args=TrainingArguments(**settings),
                train_dataset=rows,  # type: ignore[arg-type]
                data_collator=DataCollatorForSeq2Seq(tokenizer),
                callbacks=[laps],
            )
        else:
            trainer = _sft_trainer(case, model, tokenizer, rows, settings, laps)
        laps.meter.restart()
        trainer.train()
    return {"steps": laps.steps, "losses": laps.losses, "peak_mib": peak_mib()}


def _sft_trainer(case: str, model: Any, tokenizer: Any, rows: list[dict], settings: dict, laps: Laps) -> Trainer:
    """TRL's trainer at its fastest on a CPU: float32 and no recomputation, unlike its defaults."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        **settings,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        padding_free=case == "trl padding-free",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[laps]
    )


if __name__ == "__main__":
    options = arguments().parse_args()
    shape = TINY if options.tiny else SMOLLM2_135M
    numbers = [int(i) for i in options.batches.split(",")]
    samples = work(shape, numbers, by_length=options.case == "trl grouped")
    print(json.dumps(train(options.case, shape, samples, options.threads)))
