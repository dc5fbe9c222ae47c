"""What the family of head losses costs beside materialised logits: a policy loss, a divergence, and the size of chunks.

The trained tokens of `benchmarks.head_loss`: 717 rows, width 576, vocabulary 49,152, float32 on a CPU, forward and
backward.
The divergence has a teacher of width 960 (SmolLM2-360M). Each measurement runs in a process of its own.

    python -m benchmarks.head_family [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.meter import cost_of
from benchmarks.record import record
from benchmarks.rounds import Case, compare, run_rounds

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = 717, 576, 960, 49152
CHUNKS = (64, 128, 256, 512, 1024)
MODULE = "benchmarks.head_family"
CASES = (
    Case("policy, materialised", "clipped surrogate and entropy bonus by autograd over log_softmax", MODULE),
    Case("policy, recompute", "the same loss of token_logprobs", MODULE),
    Case("policy, one pass", "the same loss as an epilogue of linear_token_loss", MODULE),
    Case("divergence, materialised", "Jensen-Shannon divergence by autograd over two log_softmax", MODULE),
    Case("divergence, one pass", "linear_divergence", MODULE),
    *(Case(f"chunks of {rows}", f"linear_token_loss with chunk_rows={rows}", MODULE) for rows in CHUNKS),
)


def run(case: str, seed: int, threads: int) -> dict[str, float]:
    """Forward and backward of one case, in this process.

    Args:
        case: name of one of `CASES`.
        seed: of the inputs.
        threads: of torch.

    Returns:
        Seconds, rise of memory in MiB, and the loss, in which the cases of one loss must agree.
    """
    import torch

    from lit_reason.kernels import epilogues
    from lit_reason.kernels.divergence import linear_divergence
    from lit_reason.kernels.head_loss import linear_token_loss
    from lit_reason.kernels.reference import divergence
    from lit_reason.kernels.token_logprobs import token_logprobs

    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(ROWS, width, generator=g) for width in (WIDTH, TEACHER_WIDTH))
    weight, head_t = (0.02 * torch.randn(VOCABULARY, width, generator=g) for width in (WIDTH, TEACHER_WIDTH))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets, advantage = torch.randint(VOCABULARY, (ROWS,), generator=g), torch.randn(ROWS, generator=g)
    ones, old = torch.ones(ROWS), torch.full((ROWS,), -10.8)
    torch.mm(hidden[:64].detach(), hidden[:64].detach().t())  # start the thread pool before the clock
    policy = epilogues.total(epilogues.ppo_clip(advantage, old), epilogues.entropy_bonus(0.01))

    def loss() -> Any:
        if case == "policy, one pass":
            return linear_token_loss(hidden, weight, targets, ones, loss=policy).loss_sum
        if case.startswith("policy"):
            backend = "reference" if case.endswith("materialised") else "auto"
            out = token_logprobs(hidden, weight, targets, backend=backend)
            return epilogues.terms_of(policy, epilogues.Tokens(out.logp_S, out.entropy_S, slice(0, ROWS))).loss_r.sum()
        if case == "divergence, one pass":
            return linear_divergence(hidden, weight, teacher, head_t, ones, kind="jsd").loss_sum
        if case == "divergence, materialised":
            return divergence(hidden @ weight.T, teacher @ head_t.T, "jsd", 0.5).sum()
        return linear_token_loss(hidden, weight, targets, ones, chunk_rows=int(case.split()[-1])).loss_sum

    def forward_and_backward() -> float:
        value = loss()
        value.backward()
        return float(value.detach())

    cost, value = cost_of(forward_and_backward)
    return {**cost, "loss": value}


def main() -> None:
    """Run one case, or all of them in rounds and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=[case.name for case in CASES], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, options.seed, options.threads)))
        return
    runs = run_rounds(CASES, options.rounds, lambda turn: ["--seed", str(turn)], options.threads)
    result = compare(runs, CASES, "policy, materialised", ["cpu_s", "rise_mib", "loss"])
    print(record("head_family", {"threads": options.threads, "cases": result}))


if __name__ == "__main__":
    main()
