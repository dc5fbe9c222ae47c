"""Second session (8 minutes): G1 on every shape beside the peers, then G2 to G4.

python -m benchmarks.gpu.run2 [--budget-s 480] [--cpu]

Peers are used where they are installed; liger-kernel and cut-cross-entropy are pure Python.
"""

from __future__ import annotations

import torch

from benchmarks.gpu import heads
from benchmarks.gpu.heads import SHAPES, TINY, Inputs, Shape, forward_backward, make_inputs
from benchmarks.gpu.run1 import g1
from benchmarks.gpu.session import Session, arguments
from lit_reason.kernels.dispatch import backends_used

PEER_LOSSES = {
    "torch chunked": heads.torch_chunked,
    "liger": heads.liger,
    "liger scaled": heads.liger_scaled,
    "cce": heads.cce,
    "cce exact": heads.cce_exact,
}
SUPERVISED = 0.35


def timed(session: Session, shape: Shape, loss: heads.Loss) -> dict[str, float]:
    """Time and memory of a loss, forward and backward.

    Args:
        session: gives device and clock.
        shape: of the head.
        loss: to measure.
    """
    sets = [make_inputs(shape, session.device, session.dtype, seed) for seed in range(heads.INPUT_SETS)]
    return session.measure([forward_backward(loss, given) for given in sets])


def g2(session: Session) -> None:
    """G2: log-probabilities with entropies, and a policy loss in one pass against recomputed logits."""
    losses = {
        "logp + entropy, lit_reason": heads.recomputed_logp_entropy,
        "policy, one pass": heads.one_pass_policy,
        "policy, recomputed": heads.recomputed_policy,
        "logp + entropy, materialised": heads.materialised_logp_entropy,
        "logp + entropy, trl": heads.trl_logp_entropy,
        "logp + entropy, liger scaled": heads.liger_scaled_logp_entropy,
    }
    for name in ("S1 Llama-3-8B", "S2 Qwen2.5-7B"):
        shape = TINY if session.tiny else SHAPES[name]
        for label, loss in losses.items():
            work = lambda shape=shape, loss=loss: timed(session, shape, loss)  # noqa: E731
            peer = label.endswith(("materialised", "trl", "liger scaled"))
            session.case(f"G2 {name} {label}", work, needs_s=12, peer=peer)


def g3(session: Session) -> None:
    """G3: what it saves to select the 35 % of the rows that are trained."""
    shape = TINY if session.tiny else SHAPES["S2 Qwen2.5-7B"]

    def selected(given: Inputs) -> torch.Tensor:
        index = torch.arange(0, shape.T, 1 / SUPERVISED, device=session.device).long()
        rows = (given.hidden.index_select(0, index), given.weight, *(v[index] for v in given[2:]))
        return heads.one_pass(Inputs(*rows))

    session.case("G3 all rows", lambda: timed(session, shape, heads.one_pass), needs_s=12)
    session.case("G3 35 % of the rows", lambda: timed(session, shape, selected), needs_s=12)


def g4(session: Session) -> None:
    """G4: Jensen-Shannon divergence of two heads of width 4096 over 8192 and 1024 tokens."""
    losses = (
        ("lit_reason", heads.divergence, False),
        ("materialised", heads.materialised_divergence, True),
        ("liger", heads.liger_divergence, True),
    )
    for tokens in (8192, 1024):
        shape = TINY if session.tiny else Shape(tokens, 4096, 128256)

        def work(loss, shape: Shape = shape) -> dict[str, float]:
            pairs = [
                [make_inputs(shape, session.device, session.dtype, 2 * seed + side) for side in range(2)]
                for seed in range(heads.INPUT_SETS)
            ]
            return session.measure([forward_backward(lambda s, t=t: loss(s, t), s) for s, t in pairs])

        for label, loss, peer in losses:
            session.case(f"G4 {tokens} tokens {label}", lambda loss=loss: work(loss), needs_s=12, peer=peer)


def main() -> None:
    """All cases of this session, the ones that decide a target first."""
    options = arguments(__doc__.splitlines()[0], 480)
    session = Session("run2", options)
    session.case("ceilings", session.ceilings, needs_s=10)
    ceilings = session.cases["ceilings"]
    compiled = torch.compile(heads.materialised, dynamic=False) if not session.tiny else heads.materialised
    losses = {"lit_reason": heads.one_pass, "materialised": heads.materialised, "compiled": compiled, **PEER_LOSSES}
    for name in SHAPES:
        g1(session, name, losses, ceilings)
        if name == "S2 Qwen2.5-7B":
            g3(session)
            g4(session)
            g2(session)
    session.cases["backends"] = backends_used()
    session.close()


if __name__ == "__main__":
    main()
