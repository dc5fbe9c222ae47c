"""`lit-reason demo`: train a tiny student on full and on condensed traces, check both by generation, compare.

Each arm runs as `lit-reason fit --config demo/chain-ARM` would, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.runs import clear_folder, quiet, run_fit, torch_threads
from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.core.evaluation import EvalRecord
    from lit_reason.core.metrics_log import MetricsLog

ARMS = ("full", "epic")
STYLED = 120  # labelled texts for smoke/steering
ROWS, HELD_OUT = 12_800, 256
QUICK_ROWS, QUICK_HELD_OUT = 640, 32
MADE_HERE = {"data", "base", "cache", "report.html", *ARMS}


@dataclass(frozen=True)
class ArmResult:
    """What came out of one arm.

    Attributes:
        name: `full` or `epic`.
        accuracy: share of the held-out problems that were solved.
        low: lower end of its 95 % Wilson interval.
        high: upper end.
        trained_tokens: tokens that carried loss.
        seconds: time spent in training steps; verification is not counted.
        log: the run's metrics.
        records: the last verification, one entry a problem.
        folder: the run folder.
    """

    name: str
    accuracy: float
    low: float
    high: float
    trained_tokens: int
    seconds: float
    log: MetricsLog
    records: tuple[EvalRecord, ...]
    folder: Path

    def time_saved(self, other: ArmResult) -> float:
        """Share of the other arm's training time that this one did without."""
        return 1 - self.seconds / other.seconds


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(
        "demo",
        "Train a tiny student twice on generated reasoning problems, on full traces and on traces that "
        "EPiC condensed to their edges, with the same seed and epochs; check held-out answers by generation; compare. "
        "Two to four minutes on two CPU cores, offline. Another one: `lit-reason demo search`.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for everything (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, weights and order (default %(default)s)")
    parser.add_argument("--rows", type=int, default=None, help=f"problems to train on (default {ROWS}; 16 a step)")
    parser.add_argument(
        "--quick", action="store_true", help=f"only try the way through: {QUICK_ROWS} problems, too few to learn from"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the demo.

    Args:
        argv: arguments after the verb.

    Returns:
        0; or 1 when an arm that had at least the default number of problems stayed at chance.

    Raises:
        UserError: the options are wrong, or `--out` is a folder with other things in it.
    """
    if argv[:1] == ["search"]:
        from lit_reason.cli.demo_search import main as search

        return search(argv[1:])
    args = build_parser().parse_args(argv)
    rows = args.rows if args.rows is not None else QUICK_ROWS if args.quick else ROWS
    if rows < 16:
        raise UserError(f"demo: --rows is {rows}; give at least 16, one step's worth")
    out: Path = args.out
    clear_folder(out, MADE_HERE, keep={"cache"})
    print("Preparing ...", end="\r", flush=True)
    with quiet(), torch_threads(1):
        chance = prepare(out, rows, QUICK_HELD_OUT if args.quick else HELD_OUT, args.seed)
        results = [run_arm(name, out, args.seed) for name in ARMS]
    from lit_reason.cli.demo_page import DISTURBED, disturbed, write_page

    page = write_page(results, out / "report.html", chance=chance, rows=rows, seed=args.seed)
    print(table(results))
    print(f"\nThe best constant guess would give {chance:.0%}. In brackets: 95 % Wilson interval.")
    if disturbed(results):
        print(DISTURBED)
    print(f"\nreport  {page}")
    for result in results:
        print(f"model   {result.folder / 'export'}   ({result.name})")
    at_chance = [result.name for result in results if result.low <= chance]
    if at_chance:
        few = "" if rows >= ROWS else f": {rows} problems are too few, {ROWS} are enough"
        print(f"\nNot above chance: {', '.join(at_chance)}{few}")
    return int(bool(at_chance) and rows >= ROWS)


def prepare(out: Path, rows: int, held_out: int, seed: int) -> float:
    """Write the problems and the untrained student, and print one line about them.

    Args:
        out: gets `data/train.jsonl`, `data/heldout.jsonl`, labelled texts in `data/styles.jsonl`, and `base/`.
        rows: problems to train on.
        held_out: problems to check on, with values that training never sees.
        seed: seed of problems and weights.

    Returns:
        Accuracy of always guessing the most common answer.
    """
    from lit_reason.tasks.chain import styled
    from lit_reason.tasks.generated import task_config, write_base, write_data
    from lit_reason.tasks.problem_file import write_problems

    config = task_config("chain", {})
    write_base(out / "base", "chain", config, seed)
    write_data(out / "data", "chain", config, rows, held_out, seed)
    write_problems(out / "data/styles.jsonl", partial(styled, config, seed), STYLED)
    print(f"Decode-and-chain: {rows:,} problems to train on, {held_out} held out; {rows // 16} steps an arm.\n")
    return config.chance


def run_arm(name: str, out: Path, seed: int) -> ArmResult:
    """Train and verify one arm.

    Args:
        name: `full` or `epic`.
        out: folder with data and base; the run goes to `out/name`.
        seed: of everything random.

    Returns:
        Its figures.
    """
    from lit_reason.callbacks.verified_generation import VerifiedGeneration
    from lit_reason.core.metrics_log import read_metrics

    options = {"vars.folder": str(out), "seed_everything": seed, "data.seed": seed}
    trainer: Any = run_fit(f"demo/chain-{name}", options, f"train {name}").trainer
    (verified,) = (c for c in trainer.callbacks if isinstance(c, VerifiedGeneration))
    assert verified.last is not None
    accuracy, low, high = verified.last.pass_at[1]
    log = read_metrics(out / name / "metrics.csv")
    tokens, seconds = log.last("perf/total_trained_tokens"), log.last("perf/total_seconds")
    assert tokens is not None and seconds is not None
    return ArmResult(name, accuracy, low, high, int(tokens), seconds, log, verified.last.records, out / name)


def table(results: Sequence[ArmResult]) -> str:
    """The comparison as lines to print; time is compared with the first arm.

    Args:
        results: the arms.
    """
    head = ("arm", "accuracy", "trained tokens", "seconds", "time saved")
    cells = [head]
    for result in results:
        accuracy = f"{result.accuracy:6.1%} [{result.low:.1%}, {result.high:.1%}]"
        saved = "" if result is results[0] else f"{result.time_saved(results[0]):.0%}"
        cells.append((result.name, accuracy, f"{result.trained_tokens:,}", f"{result.seconds:.1f}", saved))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    sides: list[Callable[[str, int], str]] = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in cells
    )
