"""C3 with TRL's GRPOTrainer: the peer of `benchmarks.policy_update`."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.sft_training import number_tokenizer
from benchmarks.policy_update import (
    CLIP_NORM,
    CLIP_RATIO,
    ENTROPY_WEIGHT,
    GROUP,
    KL_WEIGHT,
    LEARNING_RATE,
    Rollout,
    arguments,
    run,
)


def padded(rows: list[list[Any]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows side by side, filled up with zeros, and 1 where they are not."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    values = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for f, r in zip(fill, rows, strict=True)
    ]
    return torch.tensor(values), torch.tensor(mask)


def updates(config: dict[str, Any], folder: str) -> Any:
    """As `benchmarks.policy_update.updates`.

    Args:
        config: of the policy and the reference.
        folder: where both are read from.
    """
    torch.manual_seed(0)
    fields = {k: v for k, v in config.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields)).save_pretrained(folder)
    settings = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        loss_type="bnpo",  # the mean over all completion tokens
        epsilon=CLIP_RATIO,
        beta=KL_WEIGHT,
        entropy_coef=ENTROPY_WEIGHT,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "3"}]),
        processing_class=number_tokenizer(config["vocab_size"]),
    )
    model, reference = trainer.model.train(), trainer.ref_model
    trainer.current_gradient_accumulation_steps = 1  # train() would set it
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update(given: list[Rollout]) -> float:
        prompts, prompt_mask = padded([r.prompt for r in given], left=True)
        completions, completion_mask = padded([r.completion for r in given])
        ids, mask = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, completion_mask], 1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : prompts.shape[1]] = -100
        with torch.no_grad():
            scored = reference(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": completions,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([r.advantage for r in given]),
            "old_per_token_logps": padded([r.old_logp for r in given])[0],
            "ref_per_token_logps": scored.log_probs[:, -completions.shape[1] :],
        }
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return update


if __name__ == "__main__":
    print(json.dumps(run(updates, arguments().parse_args())))
