"""Which part of a reasoning trace carries its solution? Head, middle and tail, measured with a language model.

A trace is cut into thirds of its thoughts. The same solution is then scored given the prompt alone, the prompt and one
third, and the prompt and the whole trace; and the hidden states of each third are compared with those of the solution.

The EPiC paper reports mutual information between parts of the trace and the answer. Its estimator was not found; the
dependence measured here (HSIC) is a different quantity.

Shapes: T packed tokens, S solution tokens, P parts (three thirds and the solution), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from lit_reason.data.conversation import Conversation, Trace
from lit_reason.data.packing import Pack, fill_bins, pack_rows
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.errors import RowError, UserError
from lit_reason.metrics.dependence import LEAST_SAMPLES, dependence
from lit_reason.metrics.intervals import bootstrap_ratio
from lit_reason.models.language_model import LanguageModel

PARTS = ("head", "middle", "tail")
GIVEN = ("prompt", *PARTS, "all")  # what stands before the solution: the prompt, and perhaps some of the trace
ENOUGH = 256  # traces below which the figures are called rough

_OUTSIDE = -1
_SOLUTION = len(PARTS)
_STAGES = (Segment.UNDERSTANDING, Segment.EXPLORATION, Segment.CONVERGENCE)


@dataclass(frozen=True)
class EdgeRow:
    """One trace, tokenised once, whose tokens know their part.

    Attributes:
        ids: `int32 [T]` prompt, trace, solution and end token.
        part: `int8 [T]` 0, 1, 2 for the thirds, 3 for the solution, -1 for all else.
        row_id: the conversation's row id.
    """

    ids: np.ndarray
    part: np.ndarray
    row_id: str


@dataclass(frozen=True)
class TraceEdges:
    """What one trace shows.

    Attributes:
        row_id: the conversation's row id.
        tokens: tokens of head, middle, tail and solution.
        nll: summed negative log-likelihood of the solution in nats, one value for each of `GIVEN`.
        pooled_PD: mean last hidden state over each part, float64 on the CPU.
    """

    row_id: str
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    pooled_PD: torch.Tensor


@dataclass(frozen=True)
class PartFigures:
    """One line of the table.

    Args:
        tokens: mean tokens a trace.
        nll: of the solution, in nats a token, given the prompt and this part.
        drop: how much lower that is than given the prompt alone.
        drop_low: lower end of its interval.
        drop_high: upper end.
        hsic: dependence between the part's and the solution's mean hidden state; None for the whole trace.
        hsic_normalised: the same in [-1, 1].
    """

    tokens: float
    nll: float
    drop: float
    drop_low: float
    drop_high: float
    hsic: float | None
    hsic_normalised: float | None


@dataclass(frozen=True)
class EdgeReport:
    """The table.

    Args:
        traces: how many traces it rests on.
        solution_tokens: mean tokens of a solution.
        nll_prompt: of the solution given the prompt alone, in nats a token.
        level: confidence level of the intervals, which are bootstrapped over traces.
        parts: figures of `head`, `middle`, `tail` and `all`.
    """

    traces: int
    solution_tokens: float
    nll_prompt: float
    level: float
    parts: dict[str, PartFigures]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def thirds(trace: Trace) -> Trace:
    """The trace as three thoughts: its head, middle and tail.

    Head and tail have equally many thoughts, the third of all rounded to the nearest number; the middle has the rest.

    Args:
        trace: a whole trace.

    Raises:
        RowError: fewer than three thoughts, or some are missing.
    """
    n = len(trace.thoughts)
    if n != trace.total:
        raise RowError("condensed trace: thirds are cut from whole traces")
    if n < len(PARTS):
        raise RowError("fewer than three thoughts: no thirds to compare (another --segmenter may cut more)")
    edge = (n + 1) // 3
    cuts = (0, edge, n - edge, n)
    parts = tuple("".join(trace.thoughts[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    return Trace(parts, (0, 1, 2), 3)


def edge_row(conversation: Conversation, renderer: Renderer) -> EdgeRow:
    """Tokenise a conversation and say of each token of its last trained turn which part it belongs to.

    Args:
        conversation: the last trained turn has a whole, segmented trace (`Condenser` with strategy `full`).
        renderer: writes the conversation as tokens.

    Raises:
        RowError: no trace, fewer than three thoughts, no solution behind the trace, or it cannot be rendered.
    """
    trained = [i for i, message in enumerate(conversation.messages) if message.trained]
    at = trained[-1] if trained else -1
    trace = conversation.messages[at].trace if trained else None
    if trace is None:
        raise RowError("no trace: the last assistant turn has no thoughts between think markers")
    # As three thoughts, the stages that the renderer marks are the thirds.
    turn = replace(conversation.messages[at], trace=thirds(trace))
    earlier = tuple(replace(message, trained=False) for message in conversation.messages[:at])
    row = renderer.rows(replace(conversation, messages=(*earlier, turn)))[0]
    part = np.full(len(row), _OUTSIDE, dtype=np.int8)
    for number, stage in enumerate(_STAGES):
        part[row.segment == stage] = number
    in_trace = np.flatnonzero(part >= 0)
    if set(part[in_trace].tolist()) != {0, 1, 2}:
        raise RowError("a third without tokens: the trace is too short")
    part[in_trace[-1] :][row.segment[in_trace[-1] :] == Segment.SOLUTION] = _SOLUTION
    if not (part == _SOLUTION).any():
        raise RowError("no solution: nothing stands behind the trace")
    return EdgeRow(row.ids, part, row.row_id)


def given_rows(row: EdgeRow) -> list[TokenRow]:
    """The row once for each of `GIVEN`, without the tokens of the thirds that are not given.

    Tokens are left out rather than texts rendered anew, so that the solution is the same tokens in every row.

    Args:
        row: a whole trace.

    Returns:
        Rows whose trained tokens are the solution's; prompt, think markers and end token are in each of them.
    """
    rows = []
    for given in ((), (0,), (1,), (2,), (0, 1, 2)):
        left_out = [part for part in range(len(PARTS)) if part not in given]
        kept = ~np.isin(row.part, left_out)
        part = row.part[kept]
        weight = (part == _SOLUTION).astype(np.float32)
        # pack_rows carries the parts along in the place of deciles.
        rows.append(TokenRow(row.ids[kept], weight, np.zeros(len(part), np.uint8), part, row.row_id))
    return rows


def batches(rows: Sequence[EdgeRow], batch_tokens: int) -> list[list[int]]:
    """Which rows share a pack; all five versions of a row are in the same one.

    Args:
        rows: the traces.
        batch_tokens: tokens a pack may hold, or more where one trace alone needs more.
    """
    sizes = [sum(len(version) for version in given_rows(row)) for row in rows]
    return fill_bins(sizes, max([batch_tokens, *sizes]))


@torch.inference_mode()
def measure(lm: LanguageModel, rows: Sequence[EdgeRow]) -> list[TraceEdges]:
    """Score the solutions of some traces in one pack.

    Args:
        lm: the model; set it to evaluation mode before.
        rows: traces; five rows each go into the pack.

    Returns:
        One result a trace, in order.
    """
    pack = pack_rows([version for row in rows for version in given_rows(row)]).to(lm.device)
    hidden_TD = lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    logp_S = lm.head(hidden_TD[pack.index], pack.targets, pack.target_weight).logp_S
    document_S = torch.searchsorted(pack.cu_seqlens.long(), pack.index, right=True) - 1
    nll_N = torch.zeros(len(pack.lengths), dtype=torch.float64, device=lm.device)
    nll_N.index_add_(0, document_S, -logp_S.double())
    nll = nll_N.view(len(rows), len(GIVEN)).tolist()
    found = []
    for number, row in enumerate(rows):
        tokens = tuple(int((row.part == part).sum()) for part in range(_SOLUTION + 1))
        pooled_PD = _pooled(hidden_TD, pack, len(GIVEN) * number + GIVEN.index("all"))
        found.append(TraceEdges(row.row_id, tokens, tuple(nll[number]), pooled_PD))
    return found


def _pooled(hidden_TD: torch.Tensor, pack: Pack, document: int) -> torch.Tensor:
    """Mean hidden state of each part of one document."""
    start = sum(pack.lengths[:document])
    own = slice(start, start + pack.lengths[document])
    hidden, part = hidden_TD[own].double(), pack.decile[own]
    return torch.stack([hidden[part == number].mean(0) for number in range(_SOLUTION + 1)]).cpu()


def report(traces: Iterable[TraceEdges], *, level: float = 0.95, seed: int = 0) -> EdgeReport:
    """The table of some traces.

    Figures in nats a token are sums over traces divided by sums of tokens.

    Args:
        traces: from `measure`.
        level: confidence level.
        seed: of the bootstrap.

    Raises:
        UserError: fewer than four traces.
    """
    traces = sorted(traces, key=lambda t: t.row_id)  # no figure may depend on the packing
    if len(traces) < LEAST_SAMPLES:
        raise UserError(f"edges: {len(traces)} usable traces; at least {LEAST_SAMPLES} are needed, {ENOUGH} advised")
    nll = np.array([t.nll for t in traces])
    tokens = np.array([t.tokens for t in traces], dtype=np.float64)
    tokens = np.column_stack([tokens, tokens[:, :_SOLUTION].sum(1)])  # head, middle, tail, solution, all
    solution = tokens[:, _SOLUTION]
    pooled = torch.stack([t.pooled_PD for t in traces], dim=1)
    parts = {}
    for given, name in enumerate(GIVEN[1:], 1):
        drop = nll[:, 0] - nll[:, given]
        low, high = bootstrap_ratio(drop.tolist(), solution.tolist(), level=level, seed=seed)
        near = dependence(pooled[given - 1], pooled[_SOLUTION]) if name in PARTS else None
        parts[name] = PartFigures(
            tokens=float(tokens[:, given - 1 if near else -1].mean()),
            nll=float(nll[:, given].sum() / solution.sum()),
            drop=float(drop.sum() / solution.sum()),
            drop_low=low,
            drop_high=high,
            hsic=near.hsic if near else None,
            hsic_normalised=near.normalised if near else None,
        )
    return EdgeReport(len(traces), float(solution.mean()), float(nll[:, 0].sum() / solution.sum()), level, parts)
