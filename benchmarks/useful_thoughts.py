"""Condense traces by what a trained student needs: keep the thoughts whose removal raises the loss of the solution.

`python -m benchmarks.useful_thoughts train.jsonl out.jsonl --model runs/full/export --tau 0.5`

For each thought the row is scored without it. The `ceil(tau n)` thoughts whose removal raises the loss of the target
most stay, in their order; of equal ones those nearer to an edge. The target is the solution behind the closing marker,
or, with `--target rest`, all that follows the thought, later thoughts included. Rows are those of the generated tasks:
`<think>` thoughts separated by blank lines `</think>` solution.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer

BREAK = "\n\n"
ROWS_AT_ONCE = 64  # variants laid end to end in one forward pass


def trace_and_solution(record: dict) -> tuple[str, list[str], str]:
    """Question, thoughts and solution of a row."""
    user, reply = (message["content"] for message in record["messages"])
    trace, _, solution = reply.removeprefix("<think>").partition("</think>")
    return user, trace.split(BREAK), solution


def token_losses(lm: LanguageModel, row: list[int]) -> list[float]:
    """Negative log-likelihood of each token; 0 for the first, before which nothing stands."""
    return [0.0, *(-logp for logp in _logp(lm, [row])[0].tolist())]


def target_loss(lm: LanguageModel, rows: Sequence[list[int]], starts: Sequence[int]) -> list[float]:
    """Summed negative log-likelihood of each row from a position on.

    Args:
        lm: the model.
        rows: token ids.
        starts: first token that counts, at least 1.
    """
    return [-float(logp[start - 1 :].sum()) for logp, start in zip(_logp(lm, rows), starts, strict=True)]


def _logp(lm: LanguageModel, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Log-probability of all tokens but the first of each row, read end to end in one pass."""
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    edges = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    hidden = lm.hidden(ids, positions, edges.int())
    at = torch.cat([torch.arange(a + 1, b) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)])
    logp = lm.head(hidden[at - 1], ids[at], torch.ones(len(at))).logp_S
    return list(logp.split([len(row) - 1 for row in rows]))


def selection(rise: Sequence[float], tau: float) -> list[int]:
    """Places of the thoughts that stay, ascending.

    Args:
        rise: how much the loss rises without each.
        tau: share that stays.
    """
    n = len(rise)
    order = sorted(range(n), key=lambda j: (-round(rise[j], 4), min(j, n - 1 - j)))
    return sorted(order[: math.ceil(tau * n)])


def condensed(lm: LanguageModel, tokenizer, record: dict, tau: float, target: str) -> dict:
    """The row with the thoughts that matter."""
    user, thoughts, solution = trace_and_solution(record)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt = f"<|user|>{user}<|end|><|assistant|><think>"
    tail = encode(f"{solution}<|end|>")
    whole = encode(prompt + BREAK.join(thoughts) + "</think>") + tail
    rows, counted = [], []
    for j in range(len(thoughts)):
        before = encode(prompt + "".join(thought + BREAK for thought in thoughts[:j]))
        after = encode(BREAK.join(thoughts[j + 1 :]) + "</think>") + tail
        rows.append(before + after)
        counted.append(len(after) if target == "rest" else len(tail))
    losses: list[float] = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        few = rows[at : at + ROWS_AT_ONCE]
        losses += target_loss(lm, few, [len(row) - n for row, n in zip(few, counted[at:], strict=False)])
    nll = token_losses(lm, whole)
    rise = [without - sum(nll[len(whole) - n :]) for without, n in zip(losses, counted, strict=True)]
    kept = BREAK.join(thoughts[j] for j in selection(rise, tau))
    messages = [record["messages"][0], {"role": "assistant", "content": f"<think>{kept}</think>{solution}"}]
    return {**record, "messages": messages}


def main(argv: Sequence[str] | None = None) -> None:
    """Condense a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--target", choices=("solution", "rest"), default="solution")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = ModelConfig(path=args.model)
    lm, tokenizer = LanguageModel.load(config).eval(), load_tokenizer(config)
    records = [json.loads(line) for line in args.source.read_text().splitlines()]
    with torch.inference_mode(), args.out.open("w") as file:
        for record in tqdm(records, unit=" rows"):
            file.write(json.dumps(condensed(lm, tokenizer, record, args.tau, args.target)) + "\n")


if __name__ == "__main__":
    main()
