"""`lit-reason demonstrate OUT --config RECIPE`: an expert does the tasks of a recipe, as rows to train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_reason.cli.command_parser import CommandParser
from lit_reason.errors import UserError

USAGE = "lit-reason demonstrate OUT --config RECIPE [--count N] [--key.subkey VALUE ...]"
EPILOG = """\
RECIPE is one for on-policy training. A model that never earns a reward learns nothing from rewards; fine-tune it on
some of these rows first.

Example
  lit-reason demonstrate calls.jsonl --config grpo/smollm2-arithmetic --count 64
  lit-reason fit --config grpo/smollm2-arithmetic-warm --data.train_file calls.jsonl"""


def build_parser() -> CommandParser:
    """The command's parser."""
    about = "Write dialogues of the expert of a recipe's environment on its training tasks, as rows of messages."
    parser = CommandParser("demonstrate", about, EPILOG, usage=USAGE)
    parser.add_argument("out", metavar="OUT", type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, metavar="N", help="use the first N tasks (default: all)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after `demonstrate`.

    Returns:
        0.

    Raises:
        UserError: a wrong option or recipe, or an environment without an expert.
    """
    given, rest = build_parser().parse_known_args(argv)
    if given.count is not None and given.count < 1:
        raise UserError(f"demonstrate: --count is {given.count}; it must be at least 1")
    from lit_reason.cli.reason_cli import build
    from lit_reason.envs.demonstrations import demonstrations
    from lit_reason.envs.task_data import TaskData
    from lit_reason.tasks.problem_file import write_problems

    data = build("fit", rest, with_trainer=False).datamodule
    if not isinstance(data, TaskData):
        raise UserError(f"demonstrate plays tasks of TaskData; the recipe has {type(data).__name__}")
    data.setup("fit")
    tasks = data.tasks["train"][: given.count]
    env = data.env()
    rows = list(demonstrations(env, tasks))
    env.close()
    if not rows:
        raise UserError(f"demonstrate: the expert got through none of {len(tasks)} tasks")
    write_problems(given.out, lambda i: rows[i], len(rows))
    left = len(tasks) - len(rows)
    print(f"demonstrations  {len(rows):,}" + (f"; the expert did not get through {left:,} others" if left else ""))
    print(f"rows            {given.out}")
    return 0
