"""`lit-reason demo search`: a tiny student sees demonstrations of how to search, then learns by reward alone.

The two runs are `lit-reason fit --config demo/search-warm` and `lit-reason fit --config demo/search`, in this process.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.recipes import locate
from lit_reason.cli.runs import QUIET, arguments, clear_folder, quiet, run_fit, torch_threads

ROWS, QUICK_ROWS, QUICK_STEPS = 4800, 160, 4
MADE_HERE = {"data", "base", "warm", "grpo"}
FIGURES = {"search pays": "val/turn_reward", "answers right": "val/outcome", "turns": "val/turns"}


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(
        "demo search",
        "Warm a tiny student up on demonstrations of how to search, then train it by reward alone (GRPO, credit by "
        "turn) on questions about a fictional world that it has not seen; compare on held-out questions. Some minutes "
        "on one CPU core, offline.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/search"), help="folder for everything (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only try the way through, too short to learn from")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the demo.

    Args:
        argv: arguments after `demo search`.

    Returns:
        0.

    Raises:
        UserError: the options are wrong, or `--out` is a folder with other things in it.
    """
    args = build_parser().parse_args(argv)
    out: Path = args.out
    clear_folder(out, MADE_HERE)
    options: dict[str, Any] = {"vars.folder": str(out), "seed_everything": args.seed}
    with quiet(), torch_threads(1):
        rows = prepare(out, QUICK_ROWS if args.quick else ROWS, args.seed)
        print(f"{rows:,} demonstrations in other worlds of the same names; then questions about this one.\n")
        run_fit("demo/search-warm", options, "warm up")
        before = held_out(out / "warm/export", options)
        run_fit("demo/search", options | ({"trainer.max_steps": QUICK_STEPS} if args.quick else {}), "by reward")
        after = held_out(out / "grpo/export", options)
    print(table({"warmed up": before, "by reward": after}))
    print(f"\nrollouts  {out / 'grpo/rollouts.jsonl'}\nmodel     {out / 'grpo/export'}")
    return 0


def prepare(out: Path, rows: int, seed: int) -> int:
    """Write demonstrations in worlds 1, 2, ... and an untrained student that knows their words.

    Args:
        out: gets `data/demonstrations.jsonl` and `base/`.
        rows: demonstrations.
        seed: of the student's weights.

    Returns:
        The number of demonstrations.
    """
    from lit_reason.tasks.problem_file import write_problems
    from lit_reason.tasks.student import StudentConfig, words_of, write_student

    found = list(itertools.islice(_demonstrations(), rows))
    texts = (message["content"] for row in found for message in row["messages"])
    write_student(out / "base", words_of(texts), StudentConfig(), seed)
    write_problems(out / "data/demonstrations.jsonl", lambda n: found[n], len(found))
    return len(found)


def _demonstrations() -> Iterator[dict[str, Any]]:
    from lit_reason.envs.demonstrations import demonstrations
    from lit_reason.envs.search.qa import SearchQA
    from lit_reason.tasks.world import WorldConfig

    recipe = yaml.safe_load(locate("demo/search").read_text(encoding="utf-8"))
    settings = recipe["data"]["init_args"]["env"]["init_args"]
    size, settings = settings["world"], {k: v for k, v in settings.items() if k not in ("world", "rewards")}
    for seed in itertools.count(1):
        env = SearchQA(world=WorldConfig(**size, seed=seed), **settings)
        yield from demonstrations(env, (env.task(i, 0) for i in range(len(env.questions))))


def held_out(model: Path, options: dict[str, Any]) -> dict[str, float]:
    """Figures of a model on the recipe's held-out questions.

    Args:
        model: its folder.
        options: of the recipe.

    Returns:
        The value of each of `FIGURES`.
    """
    from lit_reason.cli.reason_cli import build

    given = {**options, **QUIET, "model.lm.path": str(model), "trainer.logger": False}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):  # the trainer's own table
        cli = build("validate", arguments("demo/search", {**given, "trainer.default_root_dir": scratch}))
        cli.run_verb()
    return {name: float(cli.trainer.callback_metrics[key]) for name, key in FIGURES.items()}


def table(arms: dict[str, dict[str, float]]) -> str:
    """The comparison as lines to print.

    Args:
        arms: figures by name of the arm.
    """
    cells = [["", *FIGURES]]
    for name, found in arms.items():
        cells.append([name, f"{found['search pays']:.2f}", f"{found['answers right']:.0%}", f"{found['turns']:.2f}"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )
