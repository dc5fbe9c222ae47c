"""`lit-reason edges FILE --model FOLDER`: which part of the traces carries the answer, as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lit_reason.cli.command_parser import CommandParser
from lit_reason.data.config import CondenseConfig, RenderConfig, Segmenter
from lit_reason.errors import RowError, UserError

if TYPE_CHECKING:
    from lit_reason.core.edges import EdgeReport, EdgeRow
    from lit_reason.models.language_model import LanguageModel

EPILOG = """\
Each trace is cut into thirds of its thoughts. The solution is scored given the prompt, the prompt and one
third, and the prompt and the whole trace. `drop` is how many nats a solution token loses against the prompt
alone, with a 95 % bootstrap interval over traces. `HSIC` compares mean last hidden states of a third and of
the solution; it is 0 on average where they are independent. It is not the mutual information of the EPiC
paper, whose estimator was not found.

Examples
  lit-reason edges traces.jsonl --model path/to/model
  lit-reason edges traces.jsonl --model path/to/model --segmenter paragraph+cue --limit 1000 --out edges.json"""


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("edges", "Which part of the traces carries the answer: head, middle or tail?", EPILOG)
    parser.add_argument("file", metavar="FILE", help="JSONL, JSON or parquet file, saved data set or hub id")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="folder, .gguf file or hub id that scores")
    parser.add_argument(
        "--limit", type=int, default=256, metavar="N", help="use the first N usable rows (default: 256)"
    )
    parser.add_argument("--out", metavar="JSON", help="write the figures to this file")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--segmenter", choices=get_args(Segmenter), default=CondenseConfig.segmenter, help="what a thought is"
    )
    rows.add_argument("--pattern", metavar="REGEX", help="separator of the regex segmenter")
    rows.add_argument(
        "--min-chars",
        type=int,
        default=CondenseConfig.min_chars,
        metavar="N",
        help=f"a shorter fragment joins the thought before it (default: {CondenseConfig.min_chars})",
    )
    rows.add_argument("--format", default="auto", help="row format; auto looks at each row's keys")
    rows.add_argument("--chat-template", metavar="FILE", help="replaces the tokenizer's own")
    rows.add_argument(
        "--turn-text", choices=("template", "verbatim"), default="template", help="verbatim: the turn as the row has it"
    )
    rows.add_argument("--max-length", type=int, default=4096, metavar="N", help="skip longer rows (default: 4096)")
    rows.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens scored at once (default: 16384)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after `edges`; default: those of the process.

    Returns:
        0.

    Raises:
        UserError: a wrong option, model or file, or fewer than four usable rows.
    """
    options = vars(build_parser().parse_args(argv))
    for name in ("limit", "max_length", "batch_tokens"):
        if options[name] < 1:
            raise UserError(f"edges: --{name.replace('_', '-')} is {options[name]}; at least 1 is needed")
    out = Path(options["out"]) if options["out"] else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"cannot write {out}: " + ("it is a folder" if out.is_dir() else f"no folder {out.parent}"))
    import torch

    from lit_reason.core.edges import report
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.language_model import LanguageModel
    from lit_reason.models.loading import load_tokenizer

    config = ModelConfig(path=options["model"], chat_template=options["chat_template"])
    tokenizer = load_tokenizer(config)
    lm = LanguageModel.load(config).eval()
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    options["max_length"] = min(options["max_length"], lm.max_length or options["max_length"])
    rows, skipped = _read(options, tokenizer)
    found = report(_measure(lm, rows, options["batch_tokens"]))
    print(table(found))
    if skipped:
        print(f"skipped  {skipped.total():,} rows: {_counts(skipped)}")
    if out:
        from lit_reason.data.reading.row_files import complete_or_absent

        facts = {"file": options["file"], "model": options["model"], "segmenter": options["segmenter"]}
        facts |= {"min_chars": options["min_chars"], "skipped": dict(skipped)}
        with complete_or_absent(out) as unfinished:
            unfinished.write_text(json.dumps(facts | found.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"written  {out}")
    return 0


def _read(options: dict[str, Any], tokenizer: Any) -> tuple[list[EdgeRow], Counter[str]]:
    """The first usable rows of the file, at least one, and why others were passed over on the way."""
    from tqdm import tqdm

    from lit_reason.core.edges import edge_row
    from lit_reason.data.condensation.condense import Condenser
    from lit_reason.data.reading.formats import to_conversation
    from lit_reason.data.reading.records import Quarantine, read_records
    from lit_reason.data.rendering.render import Renderer

    names = ("segmenter", "pattern", "min_chars")
    tokenizer.model_max_length = 10**9  # long rows are counted here, not warned about
    condenser = Condenser(
        CondenseConfig(strategy="full", min_tokens=0, **{name: options[name] for name in names}),
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )
    renderer = Renderer(tokenizer, RenderConfig(train_on="last", turn_text=options["turn_text"]))
    rows: list[EdgeRow] = []
    skipped: Counter[str] = Counter()
    first = ""
    unreadable = Quarantine(None, max_bad_rows=100)
    with tqdm(total=options["limit"], desc="read", unit=" rows", disable=None, delay=1, leave=False) as bar:
        for row_id, record in read_records(options["file"], unreadable):
            try:
                conversation = condenser(to_conversation(record, row_id, format=options["format"], train_on="last"))
                if conversation is None:
                    raise RowError("trace without a closing marker")
                row = edge_row(conversation, renderer)
            except RowError as error:
                skipped[str(error).split(":", 1)[0]] += 1
                first = first or f"\n  {row_id}: {error}"
                continue
            if len(row.ids) > options["max_length"]:
                skipped[f"longer than {options['max_length']} tokens"] += 1
                continue
            rows.append(row)
            bar.update()
            if len(rows) == options["limit"]:
                break
    skipped += unreadable.counts
    if not rows:
        raise UserError(f"edges: no usable row in {options['file']}: {_counts(skipped) or 'it is empty'}{first}")
    return rows, skipped


def _measure(lm: LanguageModel, rows: list[EdgeRow], batch_tokens: int) -> list[Any]:
    """Every row through the model, under a progress bar."""
    from tqdm import tqdm

    from lit_reason.core.edges import batches, measure

    found = []
    with tqdm(total=len(rows), desc="score", unit=" traces", disable=None, delay=1, leave=False) as bar:
        for chosen in batches(rows, batch_tokens):
            found += measure(lm, [rows[i] for i in chosen])
            bar.update(len(chosen))
    return found


def table(found: EdgeReport) -> str:
    """The figures as text.

    Args:
        found: from `lit_reason.core.edges.report`.
    """
    from lit_reason.core.edges import ENOUGH

    lines = [f"{'given':<16}{'tokens':>8}{'NLL':>9}{'drop':>9}  {'95 % interval':<20}{'HSIC':>9}{'normalised':>12}"]
    lines.append(f"{'prompt':<16}{'':>8}{found.nll_prompt:>9.4f}")
    for name, part in found.parts.items():
        interval = f"{part.drop_low:.4f} .. {part.drop_high:.4f}"
        line = f"{'prompt + ' + name:<16}{part.tokens:>8.1f}{part.nll:>9.4f}{part.drop:>9.4f}  {interval:<20}"
        if part.hsic is not None:
            line += f"{part.hsic:>9.5f}{part.hsic_normalised:>12.3f}"
        lines.append(line.rstrip())
    lines.append("")
    lines.append(
        f"NLL of the solution in nats a token; {found.traces:,} traces, {found.solution_tokens:.1f} tokens a solution"
    )
    if found.traces < ENOUGH:
        lines.append(f"fewer than {ENOUGH} traces: read HSIC as a rough figure")
    return "\n".join(lines)


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{n:,} x {reason}" for reason, n in skipped.most_common())
