"""`lit-reason inspect`: rows as the loss sees them, span by span, and what is wrong in a file. Loads no weights.

With `--config` everything is read as `fit` reads it: recipes compose, options override, `${...}` resolves.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.condense import add_rules, bytes_of, characters
from lit_reason.cli.config_files import CONFIG_OPTIONS
from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.data.datamodule import TraceData
    from lit_reason.data.inspection.xray_scan import Picture, Scan

USAGE = """lit-reason inspect [FILE] --config RECIPE [--rows N] [--html PAGE] [--key.subkey VALUE ...]
       lit-reason inspect FILE --model FOLDER [--rows N] [--html PAGE] [--strategy epic --tau 0.5 ...]"""
EPILOG = """\
Exit code 0 when nothing is wrong; 2 when a mask is empty, an end token is not trained, a think block is doubled,
emptied or dropped, training and generation prompts disagree, an answer does not follow from the text left, or
more rows are unusable than a run would bear.

Examples
  lit-reason inspect --config sft/smollm2-epic --data.train_file traces.jsonl --data.condense.tau 0.4
  lit-reason inspect traces.jsonl --model path/to/model --strategy epic --tau 0.5 --min-tokens 0
  lit-reason inspect traces.jsonl --model path/to/model --row 17 --full
  lit-reason inspect traces.jsonl --model path/to/model --rows 20 --html xray.html"""


def build_parser(*, with_config: bool = False) -> CommandParser:
    """The command's parser.

    Args:
        with_config: a recipe gives the settings; all options but those of the X-ray itself are left over for it.
    """
    parser = CommandParser(
        "inspect",
        "Show rows span by span, as the loss sees them, and find what is wrong in a file.",
        EPILOG,
        usage=USAGE,
    )
    xray = parser.add_argument_group("the X-ray")
    xray.add_argument(
        "--rows", type=int, default=3, metavar="N", help="show the first N rows, and the first N with a finding"
    )
    xray.add_argument("--row", action="append", default=[], metavar="NAME", help="show this row: its name or number")
    xray.add_argument("--full", action="store_true", help="show long spans whole")
    xray.add_argument("--html", metavar="PAGE", help="write a page with the rows shown")
    if with_config:
        xray.add_argument("--split", choices=("train", "val", "test"), default="train", help="which file of the recipe")
        return parser
    parser.add_argument("file", metavar="FILE", help="JSONL, JSON or parquet file, saved data set or hub id")
    parser.add_argument("--config", metavar="RECIPE", help="take all that follows from a recipe instead")
    model = parser.add_argument_group("model and rows")
    model.add_argument("--model", required=True, metavar="FOLDER", help="folder, .gguf file or hub id of the tokenizer")
    model.add_argument("--chat-template", metavar="FILE", help="replaces the tokenizer's own")
    model.add_argument("--format", default="auto", help="row format; auto looks at each row's keys")
    choices = get_type_hints(RenderConfig)
    for name, text in (
        ("mode", "chat renders by the template, plain joins prompt and completion"),
        ("turn_text", "template, or verbatim: the turn as the row has it"),
        ("train_on", "assistant: every assistant turn; last: the last one"),
    ):
        option = f"--{name.replace('_', '-')}"
        model.add_argument(option, choices=get_args(choices[name]), default=getattr(RenderConfig, name), help=text)
    model.add_argument("--max-length", type=int, default=2048, metavar="N", help="longest row (default: 2048)")
    model.add_argument(
        "--max-bad-rows", type=int, default=100, metavar="N", help="unusable rows a run would bear (default: 100)"
    )
    add_rules(parser, strategy="full")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after `inspect`; default: those of the process.

    Returns:
        0, or 2 with a message that names the first bad row.

    Raises:
        UserError: a wrong option, recipe, model or file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(token.partition("=")[0] in CONFIG_OPTIONS for token in argv) and not {"-h", "--help"} & set(argv):
        options, data = _of_recipe(argv)
    else:
        options, data = _of_file(argv)
    if options["html"]:
        _check_page(Path(options["html"]))
    from lit_reason.cli.inspect_text import Screen
    from lit_reason.data.inspection.xray_scan import Scan

    scan = Scan(data, options.get("split", "train"))
    screen = Screen(data.renderer, full=options["full"])
    shown: list[Picture] = []
    for picture in _progress(scan):
        if _chosen(picture, options, shown):
            shown.append(picture)
            screen.row(picture)
    screen.summary(scan)
    sys.stdout.flush()  # before a message on the error stream
    if options["html"]:
        from lit_reason.cli.inspect_page import write_page

        print(f"page  {write_page(Path(options['html']), scan, shown)}")
    return _verdict(scan)


def _of_recipe(argv: list[str]) -> tuple[dict[str, Any], TraceData]:
    """Options of the X-ray, and the data module of a recipe with its tokenizer."""
    given, rest = build_parser(with_config=True).parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        rest = [*rest[1:], f"--data.{given.split}_file={rest[0]}"]
    from lit_reason.cli.reason_cli import build
    from lit_reason.data.datamodule import TraceData

    cli = build("fit", rest, with_trainer=False)
    if not isinstance(cli.datamodule, TraceData):
        raise UserError(f"inspect looks at rows of TraceData; the recipe has {type(cli.datamodule).__name__}")
    cli.datamodule.tokenizer = cli.model.tokenizer
    return vars(given), cli.datamodule


def _of_file(argv: list[str]) -> tuple[dict[str, Any], TraceData]:
    """The same from options alone."""
    options = vars(build_parser(with_config=False).parse_args(argv))
    condense = CondenseConfig(**{f.name: options.pop(f.name) for f in dataclasses.fields(CondenseConfig)})
    render = RenderConfig(**{name: options[name] for name in ("mode", "turn_text", "train_on")})
    from lit_reason.data.datamodule import TraceData
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.loading import load_tokenizer

    data = TraceData(
        train_file=options["file"],
        format=options["format"],
        condense=condense,
        render=render,
        max_length=options["max_length"],
        max_bad_rows=options["max_bad_rows"],
    )
    data.tokenizer = load_tokenizer(ModelConfig(path=options["model"], chat_template=options["chat_template"]))
    return options, data


def _check_page(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def _progress(scan: Scan) -> Iterator[Picture]:
    """The pictures of a scan under a progress bar, by the size of the file where that is known."""
    from tqdm import tqdm

    sizes = [bytes_of(path) for path in scan.paths]
    total = sum(size for size in sizes if size) if all(sizes) else None
    unit = {"unit": "B", "unit_scale": True} if total else {"unit": " rows"}
    with tqdm(total=total, desc="inspect", disable=None, delay=1, leave=False, **unit) as bar:
        for picture in scan:
            yield picture
            if total is None:
                bar.update()
            elif picture.conversation is not None:
                bar.update(min(characters(picture.conversation), total - bar.n))


def _chosen(picture: Picture, options: dict[str, Any], shown: list[Picture]) -> bool:
    """Whether a row is to be shown: asked for by name, or one of the first, or one of the first with a finding."""
    if options["row"]:
        number = picture.row_id.rpartition(":")[2]
        return picture.row_id in options["row"] or number in options["row"]
    plain = sum(not p.findings for p in shown)
    ill = len(shown) - plain
    return ill < options["rows"] if picture.findings else plain + ill < options["rows"]


def _verdict(scan: Scan) -> int:
    """The exit code; a bad file is named with its first bad row on the error stream."""
    tally, unusable = scan.tally, scan.unusable
    problems = []
    if tally.failed:
        first = tally.in_order()[0]
        problems.append(f"{tally.failed:,} with findings, such as {first}")
    if unusable.total > scan.data.max_bad_rows:
        problems.append(f"{unusable.total:,} unusable, a run bears {scan.data.max_bad_rows} (max_bad_rows)")
    if not tally.rows:
        problems.append("not one row is left to train on")
    if problems:
        print(f"lit-reason: rows: {'; '.join(problems)}", file=sys.stderr)
    return 2 if problems else 0
