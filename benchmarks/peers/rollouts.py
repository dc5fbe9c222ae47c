"""C4 with transformers and TRL: the peers of `benchmarks.rollouts`.

Each turn, a peer is given all ids so far, as TRL's loop over tools does it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
)

from benchmarks.peers.sft_training import number_tokenizer
from benchmarks.rollouts import GROUP, Work, arguments, run

PAGE = 64
NEVER = -1  # no id


class AtLength(StoppingCriteria):
    """Ends each row at a length of its own, as an end token would.

    Args:
        width: of the padded prompts.
        lengths: tokens to write on each row.
    """

    def __init__(self, width: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        """Which rows are done."""
        return input_ids.shape[1] >= self.ends


def sampling(limit: int) -> GenerationConfig:
    """Temperature 1, nothing truncated."""
    return GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=limit, eos_token_id=NEVER, pad_token_id=2
    )


def one_by_one(model: Any, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Plain `generate` for each row."""
    return [
        model.generate(torch.tensor([ids]), generation_config=sampling(n))[0, len(ids) :].tolist()
        for ids, n in zip(rows, lengths, strict=True)
    ]


def padded(model: Any, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """`generate` on all rows, until the longest is done."""
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        ids,
        attention_mask=mask,
        generation_config=sampling(max(lengths)),
        stopping_criteria=[AtLength(width, lengths)],
    )
    return [row[:n].tolist() for row, n in zip(out[:, width:], lengths, strict=True)]


def continuous(manager: Any, turn: int, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Requests of this turn to a manager that keeps its blocks over turns."""
    for r, (ids, n) in enumerate(zip(rows, lengths, strict=True)):
        manager.add_request(ids, request_id=f"{turn}-{r}", max_new_tokens=n, eos_token_id=NEVER)
    done: dict[str, list[int]] = {}
    while len(done) < len(rows):
        result = manager.get_result(timeout=5)
        if result is not None and result.is_finished():
            done[result.request_id] = list(result.generated_tokens)
    return [done[f"{turn}-{r}"] for r in range(len(rows))]


def continuous_manager(model: Any, given: Work) -> Any:
    """A manager with room for all turns of the work."""
    longest = max(map(len, given.prompts)) + sum(max(turn) for turn in given.lengths)
    longest += sum(max(map(len, turn)) for turn in given.observations)
    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=len(given.lengths[0]) * (-(-longest // PAGE) + 1), max_batch_tokens=1024
    )
    return model.continuous_batching_context_manager(
        generation_config=sampling(max(map(max, given.lengths))), continuous_batching_config=config, warmup=False
    )


def trl_trainer(model: Any, config: dict[str, Any]) -> Any:
    """GRPOTrainer at its fastest on a CPU: float32."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = tempfile.mkdtemp()
    settings = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=96,
        top_k=0,
        generation_kwargs={"suppress_tokens": [2]},  # its end token: lengths are given
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "3"}]),
        processing_class=number_tokenizer(config["vocab_size"]),
    )


def trl(trainer: Any, generate: Callable, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """One turn as the trainer generates it, each row ended at its length."""
    width = max(map(len, rows))
    trainer.model.generate = partial(generate, stopping_criteria=[AtLength(width, lengths)])
    ids, _ = trainer._generate_single_turn(rows, None, {}, GROUP)
    return [row[:n] for row, n in zip(ids, lengths, strict=True)]


def player(case: str, config: dict[str, Any]) -> Callable[[Work], list[list[int]]]:
    """As `benchmarks.rollouts.player`.

    Args:
        case: name of a peer's case.
        config: of the model.
    """
    torch.manual_seed(0)
    fields = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields)).eval()
    trainer = trl_trainer(model, config) if case == "trl" else None
    generate = model.generate

    def play(given: Work) -> list[list[int]]:
        rows = [list(prompt) for prompt in given.prompts for _ in range(GROUP)]
        held = continuous_manager(model, given) if case == "continuous" else nullcontext()
        with torch.no_grad(), held as manager:
            for turn, lengths in enumerate(given.lengths):
                ways: dict[str, Callable[[], list[list[int]]]] = {
                    "generate": partial(one_by_one, model, rows, lengths),
                    "generate padded": partial(padded, model, rows, lengths),
                    "continuous": partial(continuous, manager, turn, rows, lengths),
                    "trl": partial(trl, trainer, generate, rows, lengths),
                }
                said = given.observations[turn] if turn < len(given.observations) else [[] for _ in rows]
                rows = [row + new + more for row, new, more in zip(rows, ways[case](), said, strict=True)]
        return rows

    return play


if __name__ == "__main__":
    print(json.dumps(run(player, arguments().parse_args())))
