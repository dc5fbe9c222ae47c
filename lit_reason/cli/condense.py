"""`lit-reason condense IN OUT`: shorten the reasoning traces of a file. Imports neither torch nor data before
it runs.

Rows keep their format; what changes is the text of their traces. The file is streamed row by row, written
beside OUT under another name and renamed when complete, so that OUT never holds half a result.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lit_reason.cli.command_parser import CommandParser
from lit_reason.data.config import CondenseConfig
from lit_reason.errors import RowError, UserError

if TYPE_CHECKING:
    from lit_reason.data.condensation.condense import Condenser
    from lit_reason.data.conversation import Conversation
    from lit_reason.data.reading.records import Quarantine
    from lit_reason.data.reading.row_files import Put

APPROXIMATE = "approximate tokens (runs of up to 6 letters, single digits, single other characters)"
EPILOG = """\
The defaults of this command differ from those of a recipe in one point: the strategy is `epic`.
Predicted time saved is 1 - tokens after / tokens before over prompt, trace and solution of the rows kept.
Strategy truncate is for training only: a file cannot say that no end token may follow the cut.

Examples
  lit-reason condense traces.jsonl short.jsonl --tau 0.5 --rho 0.5
  lit-reason condense traces.jsonl short.jsonl --budget tokens --model path/to/model
  lit-reason condense worked.jsonl short.jsonl --on-missing whole --min-tokens 0"""

_PIECE = re.compile(r"[^\W\d_]{1,6}|\d|[^\w\s]|_|\n+")


def approximate_tokens(text: str) -> int:
    """Tokens of a text without a tokenizer: a rough count that depends on nothing but the text.

    Each run of up to 6 letters, each digit, each other visible character and each run of line breaks is one
    token.

    Args:
        text: any text.
    """
    return len(_PIECE.findall(text))


def build_parser() -> CommandParser:
    """The command's parser; the options of condensation come from the fields and docstring of
    `CondenseConfig`."""
    parser = CommandParser("condense", "Shorten the reasoning traces of a file; its rows keep their format.", EPILOG)
    parser.add_argument("source", metavar="IN", help="JSONL, JSON or parquet file, saved data set or hub id")
    parser.add_argument("target", metavar="OUT", help="file to write: .jsonl, .ndjson, .json (a list) or .parquet")
    add_rules(parser, strategy="epic")
    files = parser.add_argument_group("files")
    files.add_argument("--model", metavar="FOLDER", help="count tokens with this model's tokenizer, exactly")
    files.add_argument("--format", default="auto", help="row format; auto looks at each row's keys")
    files.add_argument(
        "--train-on",
        default="assistant",
        help="condense every `assistant` turn, or the `last` one (default: assistant)",
    )
    files.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    files.add_argument(
        "--max-bad-rows",
        type=int,
        default=100,
        metavar="N",
        help="stop at more unusable rows than this (default: 100)",
    )
    return parser


def add_rules(parser: argparse.ArgumentParser, *, strategy: str) -> None:
    """Add an option for each field of `CondenseConfig`.

    Args:
        parser: of a command.
        strategy: the command's default strategy.
    """
    rules = parser.add_argument_group("condensation")
    texts = field_help(CondenseConfig)
    kinds = get_type_hints(CondenseConfig)
    for field in dataclasses.fields(CondenseConfig):
        default = strategy if field.name == "strategy" else field.default
        shown = "" if default in (None, "") else f" (default: {default})"
        rules.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=_reader(kinds[field.name]),
            default=default,
            metavar=_metavar(field.name, kinds[field.name]),
            help=(texts[field.name] + shown).replace("%", "%%"),
        )


def field_help(config: type) -> dict[str, str]:
    """The `Args:` section of a configuration's docstring.

    Args:
        config: a dataclass with a Google docstring.

    Returns:
        Field name to description, line breaks removed.
    """
    section = (config.__doc__ or "").partition("Args:")[2]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _reader(kind: Any) -> Callable[[str], Any]:
    return kind if kind in (int, float) else str


def _metavar(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return {"scorer": "FOLDER", "teacher": "FOLDER", "pattern": "REGEX", "bridge": "TEXT"}.get(name, "N")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after `condense`; default: those of the process.

    Returns:
        0.

    Raises:
        UserError: a wrong option, path or row; nothing has been written to OUT then.
        OSError: the disk is full or refuses.
    """
    options = vars(build_parser().parse_args(argv))
    config = CondenseConfig(**{f.name: options.pop(f.name) for f in dataclasses.fields(CondenseConfig)})
    source, target = options["source"], Path(options["target"])
    ledger_file, bad_file = _beside(target, "ledger.json"), _beside(target, "quarantine.jsonl")
    _check_paths(source, target, ledger_file, options["overwrite"])
    if config.strategy == "truncate":
        raise UserError(
            "condense: a file cannot say that no end token may follow the cut, so strategy 'truncate' works "
            "in training only: lit-reason fit ... --data.condense.strategy truncate"
        )
    from lit_reason.data.condensation.condense import Condenser
    from lit_reason.data.reading.records import Quarantine
    from lit_reason.data.reading.row_files import complete_or_absent, row_writer

    unit, count_tokens = _counter(options["model"])
    condenser = Condenser(config, count_tokens)
    bad_file.unlink(missing_ok=True)
    with (
        Quarantine(bad_file, options["max_bad_rows"]) as quarantine,
        complete_or_absent(target) as rows_part,
        complete_or_absent(ledger_file) as ledger_part,
    ):
        with row_writer(rows_part, target, source) as put:
            written = _condense_rows(condenser, source, quarantine, options, put)
        if not written:
            raise UserError(
                f"no row of {source} is left, nothing was written\n{condenser.ledger.summary()}\n{quarantine.summary()}"
            )
        ledger = {"source": source, "tokens_are": unit, "config": dataclasses.asdict(config), **_versions()}
        ledger |= condenser.ledger.to_dict() | {"bad_rows": dict(quarantine.counts)}
        ledger_part.write_text(json.dumps(ledger, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{condenser.ledger.summary()}\ntokens are {unit}")
    if quarantine.total:
        print(quarantine.summary())
    print(f"written  {target}\nledger   {ledger_file}")
    return 0


def _condense_rows(condenser: Condenser, source: str, quarantine: Quarantine, options: dict[str, Any], put: Put) -> int:
    """Every row of the source through the condenser; returns how many were written."""
    from tqdm import tqdm

    from lit_reason.data.reading.formats import to_conversation, write_back
    from lit_reason.data.reading.records import read_records

    total = bytes_of(source)
    written = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="condense", disable=None, delay=1) as bar:
        for row_id, record in read_records(source, quarantine):
            try:
                conversation = to_conversation(record, row_id, format=options["format"], train_on=options["train_on"])
                condensed = condenser(conversation)
            except RowError as error:
                quarantine.add(row_id, error, record)
                continue
            read = characters(conversation)
            if condensed is not None:
                read += put(write_back(record, condensed)) - characters(condensed)
                written += 1
            # The reader does not tell its place in the file; the size of the row as written is close to it.
            bar.update(read if total is None else min(read, total - bar.n))
    return written


def characters(conversation: Conversation) -> int:
    """Characters of all turns: about the bytes of the row, for a progress bar.

    Args:
        conversation: of one row.
    """
    return sum(len(m.content) + len(m.reasoning or "") for m in conversation.messages)


def bytes_of(source: str) -> int | None:
    """Size of a plain file; None where the rows' size is not that of the file.

    Args:
        source: what the user gave.
    """
    path = Path(source)
    return path.stat().st_size if path.is_file() and path.suffix in (".jsonl", ".ndjson", ".json", ".txt") else None


def _beside(target: Path, name: str) -> Path:
    return target.with_name(f"{target.name}.{name}")


def _check_paths(source: str, target: Path, ledger_file: Path, overwrite: bool) -> None:
    """Refuse an output that is the input, cannot be written, or is there already."""
    from lit_reason.data.reading.row_files import row_suffix

    row_suffix(target)
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    inputs = [name for part in source.split(",") for name in (glob.glob(part.strip()) or [part.strip()])]
    for name in inputs:
        if target.exists() and Path(name).exists() and target.samefile(name):
            raise UserError(f"IN and OUT are the same file, {target}: choose another name for OUT")
    for path in (target, ledger_file):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: give another name, or --overwrite to replace it")


def _counter(model: str | None) -> tuple[str, Callable[[str], int]]:
    """What is counted, in words, and the counter."""
    if model is None:
        return APPROXIMATE, approximate_tokens
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(ModelConfig(tokenizer=model))
    tokenizer.model_max_length = sys.maxsize  # no warning about long texts: they are counted, not run
    return f"tokens of {model}", lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _versions() -> dict[str, Any]:
    from lit_reason import __version__
    from lit_reason.data.condensation.thoughts import SEGMENTER_VERSION

    return {"lit_reason": __version__, "segmenter_version": SEGMENTER_VERSION}
