"""Verified generation: sample answers to held-out prompts, check each, and say how sure the numbers are."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch.distributed as dist
from tqdm.auto import tqdm

from lit_reason.data.condensation.markers import MARKERS, split_trace
from lit_reason.data.prompts import EvalPrompt
from lit_reason.errors import UserError
from lit_reason.metrics.intervals import pass_at_k, wilson
from lit_reason.metrics.repetition import tail_repeats
from lit_reason.rewards.checkers import BUILTIN, Checker
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import Completion, HasModel, sample

TraceState = Literal["closed", "open", "none"]
Part = Literal["solution", "all"]


@dataclass(frozen=True)
class EvalRecord:
    """One completion and what was found out about it. Plain values only.

    Attributes:
        row_id: name of the record.
        sample: which of the prompt's samples.
        prompt: the prompt as a person reads it.
        completion: the generated text, thoughts included.
        answer: the reference answer.
        correct: the checker's verdict; False when it could not judge.
        reason: why it is not correct.
        error: the checker raised, with what; empty otherwise.
        tokens: generated tokens, end token included.
        ended: the end token was reached.
        trace: the reasoning is `closed` (its closing marker was written), `open` (only an opening marker, in
            the completion or at the end of the prompt), or there is `none`.
        repeats: the completion ends in a loop (`metrics.repetition.tail_repeats`).
    """

    row_id: str
    sample: int
    prompt: str
    completion: str
    answer: str | None
    correct: bool
    reason: str
    error: str
    tokens: int
    ended: bool
    trace: TraceState
    repeats: bool

    @property
    def closed(self) -> bool:
        """The end token was reached and no trace was left open."""
        return self.ended and self.trace != "open"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EvalResult:
    """All records of one evaluation and the numbers that follow from them.

    Attributes:
        records: one for each completion, ordered by prompt and then by sample.
        samples: completions a prompt.
        ks: the k of each pass@k.
        level: confidence level of the intervals.
    """

    records: tuple[EvalRecord, ...]
    samples: int
    ks: tuple[int, ...] = (1,)
    level: float = 0.95

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.records) // self.samples

    @property
    def checker_errors(self) -> int:
        """Completions that the checker could not judge; pass@k counts them as not correct."""
        return sum(bool(r.error) for r in self.records)

    @cached_property
    def pass_at(self) -> dict[int, tuple[float, float, float]]:
        """For each k: the estimate of pass@k and the ends of its interval (n = number of prompts; see
        `wilson`)."""
        right = [
            sum(r.correct for r in self.records[start : start + self.samples])
            for start in range(0, len(self.records), self.samples)
        ]
        found = {}
        for k in self.ks:
            total = sum(pass_at_k(self.samples, c, k) for c in right)
            found[k] = (total / self.prompts, *wilson(total, self.prompts, self.level))
        return found

    def metrics(self, prefix: str = "val/") -> dict[str, float]:
        """The numbers to log.

        Args:
            prefix: put before each name.

        Returns:
            `pass@k`, `pass@k_low`, `pass@k_high` for each k; the shares `closed` (end token reached and no
            trace left open), `ended` (end token reached), `traced` (a closing think marker was written),
            `repetition` (ends in a loop); the mean `generated_tokens`; and the count `checker_errors`.
        """
        numbers: dict[str, float] = {}
        for k, (rate, low, high) in self.pass_at.items():
            numbers |= {f"pass@{k}": rate, f"pass@{k}_low": low, f"pass@{k}_high": high}
        n = len(self.records)
        numbers |= {
            "closed": sum(r.closed for r in self.records) / n,
            "ended": sum(r.ended for r in self.records) / n,
            "traced": sum(r.trace == "closed" for r in self.records) / n,
            "generated_tokens": sum(r.tokens for r in self.records) / n,
            "repetition": sum(r.repeats for r in self.records) / n,
            "checker_errors": float(self.checker_errors),
        }
        return {prefix + name: value for name, value in numbers.items()}

    def table(self) -> str:
        """The numbers as lines to print."""
        m = self.metrics("")
        lines = [("problems", f"{self.prompts}" + (f" x {self.samples} samples" if self.samples > 1 else ""))]
        for k, (rate, low, high) in self.pass_at.items():
            lines.append((f"pass@{k}", f"{rate:.1%}   [{low:.1%}, {high:.1%}] at {self.level:.0%}"))
        lines += [
            (
                "closed",
                f"{m['closed']:.1%}   end token reached {m['ended']:.1%}, thoughts closed {m['traced']:.1%}",
            ),
            ("generated tokens", f"{m['generated_tokens']:.1f} a completion"),
            ("repetition", f"{m['repetition']:.1%}   completions that end in a loop"),
        ]
        if self.checker_errors:
            lines.append(("checker errors", f"{self.checker_errors}   counted as not correct"))
        wrong = Counter(r.reason for r in self.records if r.reason)
        if wrong:
            lines.append(("wrong because", ", ".join(f"{reason} ({n})" for reason, n in wrong.most_common(5))))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def evaluate(
    lm: HasModel,
    tokenizer: Any,
    prompts: Sequence[EvalPrompt],
    sampling: SamplingConfig,
    checker: Checker,
    k: Sequence[int] = (1,),
    *,
    stop_ids: Sequence[int],
    progress: bool = True,
    part: Part = "solution",
    ranks: Literal["same", "split"] = "same",
) -> EvalResult:
    """Sample completions for held-out prompts and check them.

    Several processes: with `split`, process r of w takes the prompts r, r + w, ... and all of them get the
    whole result; right when each holds the whole model (DDP). With `same` every process does all of the work,
    in step, with equal results: sharded models need that, since their processes must run the same forward
    passes.

    Args:
        lm: the model, as `lm.hf`.
        tokenizer: gives the padding token and decodes.
        prompts: the problems.
        sampling: how to sample; `sampling.samples` must be at least the largest k.
        checker: judges each completion.
        k: which pass@k to estimate.
        stop_ids: end tokens.
        progress: show progress bars.
        part: what the checker reads: the `solution` after the closing think marker (all of a text without
            markers, nothing of one whose thoughts never ended), or `all` of the completion.
        ranks: how several processes share the work.

    Returns:
        The records and their numbers.

    Raises:
        UserError: there is no prompt, a k needs more samples, or the checker can judge none of the
            completions.
    """
    if not prompts:
        raise UserError("there is no prompt to generate for: the held-out data is empty")
    if not k or min(k) < 1 or max(k) > sampling.samples:
        raise UserError(
            f"pass@k with k = {list(k)} from sampling.samples = {sampling.samples}: "
            "each k must be at least 1 and at most the number of samples a prompt"
        )
    _check_references(prompts, checker)
    world = dist.get_world_size() if ranks == "split" and dist.is_available() and dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    mine = prompts[rank::world]
    completions = sample(lm, tokenizer, [p.ids for p in mine], sampling, stop_ids=stop_ids, progress=progress)
    thinking = [_opens_trace(tokenizer.decode(p.ids[-16:], skip_special_tokens=False)) for p in mine]
    bar = tqdm(completions, desc="check", unit="answer", leave=False, delay=1, disable=not progress)
    records = [_judge(c, mine[c.prompt_index], thinking[c.prompt_index], checker, part, stop_ids) for c in bar]
    if world > 1:
        records = _interleave(records, world, sampling.samples, len(prompts))
    result = EvalResult(tuple(records), sampling.samples, tuple(k))
    _report_errors(result, checker)
    return result


def solution_part(text: str, *, prompt_opens_trace: bool = False) -> tuple[str, TraceState]:
    """What a completion says after its thoughts.

    Args:
        text: the completion.
        prompt_opens_trace: the prompt ends with an opening think marker.

    Returns:
        The text after the closing marker and `closed`; all of the text and `none` where there is no marker;
        an empty text and `open` where thoughts began and did not end: then no answer was given.
    """
    trace = split_trace(text)
    if trace is None:
        return ("", "open") if prompt_opens_trace else (text, "none")
    if trace.case != "open_only":
        return trace.rest, "closed"
    return "", "open"


def _opens_trace(prompt_end: str) -> bool:
    return prompt_end.rstrip().endswith(tuple(pair.opening for pair in MARKERS))


def _judge(
    completion: Completion,
    prompt: EvalPrompt,
    thinking: bool,
    checker: Checker,
    part: Part,
    stop_ids: Sequence[int],
) -> EvalRecord:
    solution, trace = solution_part(completion.text, prompt_opens_trace=thinking)
    correct, reason, error = False, "", ""
    if part == "solution" and trace == "open":
        reason = "thoughts never ended"
    else:
        read = solution if part == "solution" else completion.text
        correct, reason, error = _verdict(checker, read, prompt)
    written = completion.ids[:-1] if completion.closed_eos else completion.ids
    return EvalRecord(
        row_id=prompt.row_id,
        sample=completion.sample_index,
        prompt=prompt.text,
        completion=completion.text,
        answer=prompt.answer,
        correct=correct,
        reason=reason,
        error=error,
        tokens=len(completion.ids),
        ended=completion.closed_eos,
        trace=trace,
        repeats=tail_repeats(written),
    )


def _verdict(checker: Checker, text: str, prompt: EvalPrompt) -> tuple[bool, str, str]:
    """Verdict, reason, and error: a checker that fails is not the model's mistake, and must not end the
    run."""
    try:
        verdict = checker(text, prompt.answer, prompt.metadata)
    except UserError as error:
        return False, "", str(error)
    except Exception as error:
        return False, "", f"{type(error).__name__}: {error}"
    return verdict.correct, verdict.reason, ""


def _check_references(prompts: Sequence[EvalPrompt], checker: Checker) -> None:
    """Find out before minutes of generation that no row can be judged; a function of the user's own is not
    asked."""
    if checker.name.partition(":")[0] not in BUILTIN:
        return
    errors = [_verdict(checker, "", p)[2] for p in prompts]
    if all(errors):
        raise UserError(
            f"checker '{checker.name}' can judge none of the {len(prompts)} prompts; {prompts[0].row_id}: {errors[0]}"
        )


def _report_errors(result: EvalResult, checker: Checker) -> None:
    failed = [r for r in result.records if r.error]
    if not failed:
        return
    first = f"{failed[0].row_id}: {failed[0].error}"
    if len(failed) == len(result.records):
        raise UserError(f"checker '{checker.name}' failed on every completion; first {first}")
    warnings.warn(
        f"checker '{checker.name}' failed on {len(failed)} of {len(result.records)} completions, which count "
        f"as not correct; first {first}",
        stacklevel=3,
    )


def _interleave(records: list[EvalRecord], world: int, samples: int, prompts: int) -> list[EvalRecord]:
    """The records of all processes in the order of the prompts."""
    parts: list[list[EvalRecord]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, records)
    ordered: list[EvalRecord] = []
    for p in range(prompts):
        start = (p // world) * samples
        ordered += parts[p % world][start : start + samples]
    return ordered
