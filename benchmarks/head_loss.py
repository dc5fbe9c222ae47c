"""C2: loss and gradients of a language-model head, ours against materialised logits and the peers' chunked operations.

2,048 tokens, width 576, vocabulary 49,152 (the shape of SmolLM2-135M), 35 % of the tokens trained, float32 on a CPU.
Each measurement runs in a process of its own, for its peak memory; rounds alternate between the cases, and every round
draws new inputs, the same for all cases.

    python -m benchmarks.head_loss [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.meter import cost_of
from benchmarks.record import record
from benchmarks.rounds import Case, case_arguments, compare, peer_versions, run_rounds

TOKENS, WIDTH, VOCABULARY, TRAINED = 2048, 576, 49152, 0.35
TINY = (64, 16, 199)
OURS, PEERS = "benchmarks.head_loss", "benchmarks.peers.head_loss"
CASES = (
    Case("materialised", "cross entropy over logits of every token, untrained ones ignored", OURS),
    Case("materialised, trained", "cross entropy over logits of the trained tokens", OURS),
    Case("torch", "torch's linear_cross_entropy, its default chunking, trained tokens", OURS),
    Case("trl", "TRL's chunked log-probabilities of every token, as its trainers take them on a CPU", PEERS, True),
    Case("trl, trained", "the same operation on the trained tokens", PEERS, True),
    Case("liger, trained", "Liger's scaled cross entropy on the trained tokens", PEERS, True),
    Case("lit_reason logprobs", "token_logprobs on the trained tokens: logits computed twice, for any loss", OURS),
    Case("lit_reason", "linear_token_loss on the trained tokens: logits computed once", OURS),
)


class Inputs(NamedTuple):
    """Random hidden states and head weight, both with gradients, and targets; -100 where not trained."""

    hidden: Any
    weight: Any
    targets: Any


def inputs(seed: int, tokens: int, width: int, vocabulary: int) -> Inputs:
    """New inputs of a round.

    Args:
        seed: the same gives the same inputs to every case.
        tokens: rows.
        width: of a row.
        vocabulary: rows of the head weight.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) >= TRAINED] = -100
    return Inputs(hidden, weight, targets)


def loss_of(case: str) -> Callable[[Inputs], Any]:
    """How one of our cases gets the summed negative log-likelihood of the trained tokens."""
    import torch
    from torch.nn import functional as F

    from lit_reason.kernels.head_loss import linear_token_loss
    from lit_reason.kernels.token_logprobs import token_logprobs

    def materialised(given: Inputs) -> Any:
        return F.cross_entropy(F.linear(given.hidden, given.weight), given.targets, reduction="sum")

    def chunked(given: Inputs) -> Any:
        options = torch.nn.LinearCrossEntropyOptions()  # absent before torch 2.13: the case then fails and says so
        return F.linear_cross_entropy(*given, reduction="sum", options=options)

    def recomputed(given: Inputs) -> Any:
        return -token_logprobs(*given).logp_S.sum()

    def one_pass(given: Inputs) -> Any:
        return linear_token_loss(*given, torch.ones(len(given.targets))).loss_sum

    losses = {"torch": chunked, "lit_reason logprobs": recomputed, "lit_reason": one_pass}
    return materialised if case == "materialised" else lambda given: losses.get(case, materialised)(trained(given))


def trained(given: Inputs) -> Inputs:
    """The rows that are trained, with their targets."""
    index = (given.targets >= 0).nonzero()[:, 0]
    return Inputs(given.hidden[index], given.weight, given.targets[index])


def run(loss: Callable[[Inputs], Any], options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward once, in this process.

    Args:
        loss: of the case.
        options: parsed `arguments`.

    Returns:
        Seconds, the rise of memory in MiB, and the loss.
    """
    import torch

    torch.set_num_threads(options.threads)
    loss(inputs(0, *TINY)).backward()  # what is imported or started on first use is not on the clock
    given = inputs(options.seed, *(TINY if options.tiny else (TOKENS, WIDTH, VOCABULARY)))

    def forward_and_backward() -> float:
        value = loss(given)
        value.backward()
        return float(value.detach())

    cost, value = cost_of(forward_and_backward)
    return {**cost, "loss": value, "gradient": float(given.weight.grad.norm())}


def arguments() -> argparse.ArgumentParser:
    """Arguments of the whole benchmark, and of one case, ours or a peer's."""
    parser = case_arguments(CASES, 5, tiny="head")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run one case, or all of them in rounds and write the file."""
    options = arguments().parse_args()
    if options.case:
        print(json.dumps(run(loss_of(options.case), options)))
        return
    tiny = ["--tiny"] if options.tiny else []
    runs = run_rounds(CASES, options.rounds, lambda turn: ["--seed", str(turn), *tiny], options.threads)
    result = compare(runs, CASES, "materialised", ["cpu_s", "wall_s", "rise_mib", "loss", "gradient"])
    if not options.tiny:
        print(record("head_loss_peers", {"threads": options.threads, "peers": peer_versions(), "cases": result}))


if __name__ == "__main__":
    main()
