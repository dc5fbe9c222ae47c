"""Every operation of the table that the kernel tests are generated from, chunked and with all logits at once.

256 rows, width 576, vocabulary 49,152, a head bias, float32 on a CPU, forward and backward; the token losses compute
the log-probabilities of a reference too. A row added to `tests/kernels/operators.py` is measured here, as it is tested
there. Each measurement runs in a process of its own.

    python -m benchmarks.operators [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json

from benchmarks.meter import cost_of
from benchmarks.record import record
from benchmarks.rounds import Case, case_arguments, compare, run_rounds
from tests.kernels import operators

MODULE = "benchmarks.operators"
SIZES, TINY = {"S": 256, "D": 576, "V": 49152, "scale": 0.02}, {"S": 24, "D": 8, "V": 199, "scale": 0.2}
WAYS = {"chunked": "torch", "materialised": "reference"}  # and the backend that does it
CASES = [
    Case(f"{operator.name}, {way}", f"backend {backend}", MODULE)
    for operator in operators.OPERATORS
    for way, backend in WAYS.items()
]


def run(name: str, seed: int, tiny: bool = False) -> dict[str, float]:
    """Forward and backward of one case, in this process.

    Args:
        name: of one of `CASES`.
        seed: of the inputs.
        tiny: take a tiny head.

    Returns:
        Seconds, rise of memory in MiB, and in which both ways must agree: the loss and the norm of a gradient.
    """
    operator, way = name.rsplit(", ", 1)
    row = operators.BY_NAME[operator]
    operators.ours(row, operators.Case(**TINY))  # what is imported or started on first use is not on the clock
    sizes = TINY if tiny else SIZES
    case = operators.Case(**sizes, seed=seed, dtype=operators.torch.float32, chunk_rows=None, backend=WAYS[way])
    x = operators.inputs_of(case) | {"softcap": None}
    cost, found = cost_of(lambda: operators.run(row.call, x, operators.settings_of(case)))
    return {**cost, "loss": float(found["loss"]), "gradient": float(found["d_hidden"].norm())}


def main() -> None:
    """Run one case, or all of them in rounds and write the file."""
    parser = case_arguments(CASES, 3, tiny="head")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        operators.torch.set_num_threads(options.threads)
        print(json.dumps(run(options.case, options.seed, options.tiny)))
        return
    tiny = ["--tiny"] if options.tiny else []
    runs = run_rounds(CASES, options.rounds, lambda turn: ["--seed", str(turn), *tiny], options.threads)
    result = {}
    for chunked, materialised in zip(CASES[::2], CASES[1::2], strict=True):
        pair = (chunked, materialised)
        result |= compare(runs, pair, materialised.name, ["cpu_s", "rise_mib", "loss", "gradient"])
    if not options.tiny:
        print(record("operators", {"threads": options.threads, "cases": result}))


if __name__ == "__main__":
    main()
