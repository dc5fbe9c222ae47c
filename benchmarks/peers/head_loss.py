"""C2 with TRL's chunked log-probabilities and Liger's scaled cross entropy: the peers of `benchmarks.head_loss`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.head_loss import Inputs, arguments, run, trained

TRL_VOCABULARY_CHUNK = 32768  # what TRL 1.16 gives this operation in its trainers


def loss_of(case: str) -> Callable[[Inputs], Any]:
    """How one of the peers' cases gets the summed negative log-likelihood of the trained tokens."""
    if case.startswith("liger"):
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return lambda given: LigerFusedLinearScaledCrossEntropyFunction.apply(*trained(given)).sum()
    from trl.kernels import ChunkedLogProbFunction

    def logp(given: Inputs) -> Any:
        options = (1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(given.hidden, given.weight, None, given.targets, *options)[0]

    def every_token(given: Inputs) -> Any:
        whole = given._replace(targets=given.targets.clamp(min=0))
        return -logp(whole).masked_fill(given.targets < 0, 0.0).sum()

    return every_token if case == "trl" else lambda given: -logp(trained(given)).sum()


if __name__ == "__main__":
    options = arguments().parse_args()
    print(json.dumps(run(loss_of(options.case), options)))
