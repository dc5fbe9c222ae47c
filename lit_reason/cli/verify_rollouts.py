"""`lit-reason verify-rollouts FILE`: check recorded rollouts, and compare them with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_reason.cli.command_parser import CommandParser
from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.models.language_model import LanguageModel

EPILOG = """\
The file is the ledger of an on-policy run (`dialogue.keep_every`). Marks of every rollout are checked: whose token is
whose, log-probabilities and advantages where tokens were sampled and nowhere else, ends of turns. With --model each
sampled token is scored again, weights that sampled it agree but for rounding; and it is said how many turns would be
other tokens if their text were tokenised again.

Examples
  lit-reason verify-rollouts runs/arithmetic/version_0/rollouts.jsonl
  lit-reason verify-rollouts rollouts.jsonl --model path/to/model --most 0.01"""


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("verify-rollouts", "Check recorded rollouts, and compare them with a model", EPILOG)
    parser.add_argument("file", metavar="FILE", help="rollouts.jsonl of a run")
    parser.add_argument("--model", metavar="FOLDER", help="folder, .gguf file or hub id of the weights that sampled")
    parser.add_argument("--temperature", type=float, default=1.0, help="that they sampled with (default: 1)")
    parser.add_argument("--most", type=float, metavar="NATS", help="fail where the mean gap of a rollout is larger")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after `verify-rollouts`; default: those of the process.

    Returns:
        0, or 2 when a rollout is inconsistent or further from the model than allowed.

    Raises:
        UserError: a wrong option, file or model.
    """
    options = build_parser().parse_args(argv)
    if not Path(options.file).is_file():
        raise UserError(f"verify-rollouts: no file {options.file}")
    if options.most is not None and not options.model:
        raise UserError("verify-rollouts: --most compares with a model; give --model")
    if not options.temperature > 0:
        raise UserError(f"verify-rollouts: --temperature is {options.temperature:g}; it must be above 0")
    from lit_reason.rollout.trajectory import read_ledger
    from lit_reason.rollout.verify import drifted, gaps, inconsistencies, unheard_stops

    lm, tokenizer, stop_ids = (None, None, ()) if not options.model else _model(options.model)
    drift, turns = 0, 0
    rollouts, tokens, bad, sums, worst = 0, 0, 0, 0.0, 0.0
    for number, rollout in enumerate(read_ledger(Path(options.file)), 1):
        wrong = inconsistencies(rollout, stop_ids)
        rollouts, tokens = rollouts + 1, tokens + rollout.sampled
        if not wrong and lm is not None and rollout.sampled:
            wrong = [*foreign(rollout.ids, lm), *unheard_stops(rollout, tokenizer)]
        if not wrong and lm is not None and rollout.sampled:
            drift, turns = (a + b for a, b in zip((drift, turns), drifted(rollout, tokenizer), strict=True))
            gap = gaps(lm, rollout, options.temperature)
            sums, worst = sums + float(gap.sum()), max(worst, float(gap.max()))
            if options.most is not None and gap.mean() > options.most:
                wrong = [f"the model's log-probabilities are {float(gap.mean()):.3g} nats off on average"]
        for finding in wrong:
            print(f"line {number}, {rollout.row_id}/{rollout.rollout}: {finding}")
        bad += bool(wrong)
    if not rollouts:
        raise UserError(f"verify-rollouts: {options.file} holds no rollout")
    print(f"rollouts  {rollouts:,}, {bad:,} of them wrong; {tokens:,} sampled tokens")
    if lm is not None and tokens:
        print(f"drift     {drift:,} of {turns:,} turns would be other tokens if their text were tokenised again")
        print(f"gap       {sums / tokens:.3g} nats a token on average, {worst:.3g} at most")
    return 2 if bad else 0


def foreign(ids: Sequence[int], lm: LanguageModel) -> list[str]:
    """Ids that the model does not have.

    Args:
        ids: of a rollout.
        lm: the model.
    """
    size = lm.head.weight.shape[0]
    beyond = [i for i in ids if not 0 <= i < size]
    return [f"token id {beyond[0]} is not one of the model's {size:,}"] if beyond else []


def _model(path: str):  # noqa: ANN202
    import torch

    from lit_reason.data.rendering.chat_template import ChatTemplate
    from lit_reason.data.rendering.stop_tokens import known_stop_ids
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.language_model import LanguageModel
    from lit_reason.models.loading import load_tokenizer

    config = ModelConfig(path=path)
    lm = LanguageModel.load(config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config)
    known = known_stop_ids(tokenizer, lm.eos_ids)
    return lm, tokenizer, {*known, ChatTemplate(tokenizer, stop_ids=known).traits.end_id} - {None}
