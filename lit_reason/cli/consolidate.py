"""`lit-reason consolidate FOLDER OUT`: make one file of a checkpoint folder of shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_reason.cli.command_parser import CommandParser

EPILOG = """\
The file resumes with any strategy and number of processes:

  lit-reason consolidate runs/version_0/checkpoints/last.ckpt last-one-file.ckpt
  lit-reason fit --config RECIPE --ckpt_path last-one-file.ckpt --trainer.devices 1"""


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("consolidate", "Make one file of a checkpoint folder of shards.", EPILOG)
    parser.add_argument("folder", type=Path, help="checkpoint folder, as fsdp2 writes it")
    parser.add_argument("out", type=Path, help="file to write; must not exist")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: arguments after `consolidate`.

    Returns:
        0; what the user gave wrong is raised as UserError.
    """
    given = build_parser().parse_args(list(argv))
    from lit_reason.core.consolidate import consolidate

    checkpoint = consolidate(given.folder, given.out)
    weights = [value for value in checkpoint["state_dict"].values() if hasattr(value, "numel")]
    size = given.out.stat().st_size / 1e9
    print(f"{given.out}: step {checkpoint['global_step']}, {sum(w.numel() for w in weights):,} weights, {size:.2f} GB")
    return 0
