"""Rounds: sample -> reward -> policy, and all that has to be remembered between two steps.

Shape letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.run_folder import run_folder
from lit_reason.data.pair_buffer import Pair, PairBuffer
from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.reward import let_go, train_all_adapters
from lit_reason.regimes.irl import watch
from lit_reason.regimes.irl.answers import answer_logps, make_pair, pair_pack
from lit_reason.regimes.irl.demonstrations import PAIRS, SECTIONS, shuffled

FLAT = 1e-6  # a deviation of rewards below this tells no answers apart
WINDOW = 10  # batches over which pair accuracy is averaged
COLLAPSED = 8  # equal answers to different prompts from which on a policy counts as collapsed


@dataclass(frozen=True)
class RoundState:
    """What changes between steps beside weights and optimizer, as plain values and tensors.

    Attributes:
        number: the round whose pairs are in use; -1 before the first.
        measured: the reward of this round is finished and normalised.
        stopped: phases of this round that ended early.
        recent: pair accuracy of the last batches.
        held_out: accuracy on held-out pairs in this round.
        fixed: normalised scores of the fixed texts when last measured.
        mean: of scores on demonstrations.
        std: their deviation.
        reference: log-probabilities of both answers under the implicit reward's reference, `[N, 2]`.
        previous: the policy's trained weights at the start of the round, this process's part of them.
        pairs: state of the pair buffer.
    """

    number: int = -1
    measured: bool = False
    stopped: tuple[str, ...] = ()
    recent: tuple[float, ...] = ()
    held_out: tuple[float, ...] = ()
    fixed: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    reference: Tensor | None = None
    previous: tuple[Tensor, ...] = ()
    pairs: dict[str, Any] = field(default_factory=dict)


class Rounds:
    """The phases of the rounds of one run, worked on its regime.

    Args:
        regime: an `IRLRegime`.

    Attributes:
        state: as of now.
        settled: as of the end of the last optimizer step, which a checkpoint holds.
        chosen: numbers of the pairs that the present round's reward learns from.
    """

    def __init__(self, regime: Any) -> None:
        self.regime = regime
        self.state = self.settled = RoundState()
        self.chosen: np.ndarray = np.empty(0, dtype=np.int64)
        self._buffer: PairBuffer | None = None
        self._chunks = 0  # of the round to be sampled next that are there already

    # ---- the three phases ----

    def enter(self, batch: Any) -> None:
        """Do what comes before a step: sample the round's pairs before its first, measure the reward before its use.

        Args:
            batch: the step's.
        """
        if self._buffer is None:
            self._open()
        if batch.round != self.state.number:
            self._begin(batch.round)
        if batch.phase == "policy" and not self.state.measured:
            self._measure()

    def _open(self) -> None:
        r, state = self.regime, self.settled
        rank = r.trainer.global_rank
        self._buffer = PairBuffer(run_folder(r.trainer) / ("pairs" if rank == 0 else f"pairs-{rank}"))
        if state.pairs:
            step = r.trainer.global_step
            self._chunks = self._buffer.restore(state.pairs, state.number + 1, step)
            if len(set(from_all_ranks(self._chunks))) > 1:  # killed between two processes' writing of one chunk
                self._chunks = self._buffer.restore(state.pairs, state.number + 1, -1)
            r.set_scale(state.mean, state.std)
            self.chosen = self._select(state.number)

    def _begin(self, number: int) -> None:
        """Sample, look at the policy, choose pairs, and start the reward."""
        r, buffer = self.regime, self._buffer
        assert buffer is not None
        self._sample(number)
        own = self._own_pairs(number)
        self._report_policy(own, number)
        chosen = self._select(number)
        reference = self._reference(chosen) if r.reward_config.model == "policy" else None
        r.restart_reward(number)
        self.chosen, self._chunks = chosen, 0
        let_go(r.lm)
        previous = tuple(_local(p).detach().clone() for p in r.policy_parameters())
        self.state = RoundState(
            number, fixed=self.state.fixed, reference=reference, previous=previous, pairs=buffer.state()
        )

    def _select(self, number: int) -> np.ndarray:
        c = self.regime.reward_config
        assert self._buffer is not None
        if number < 0:
            return self.chosen
        seed = self.regime.data.seed
        return self._buffer.select(number, c.replay, mixture=c.mixture, first=c.replay_from, seed=seed)

    def _sample(self, number: int) -> None:
        """Answers to the round's prompts, a chunk at a time, each process its share; all processes get all pairs."""
        r, c, buffer = self.regime, self.regime.round_config, self._buffer
        assert buffer is not None
        rank, world, step = r.trainer.global_rank, r.trainer.world_size, r.trainer.global_step
        count = c.prompts or len(r.data)
        size = max(1, r.sampling.batch_size // c.samples) * world
        player = r.answer_player(r.sampling, c.samples)
        for chunk in range(self._chunks, -(-count // size)):
            tasks = r.data.tasks(SECTIONS, number * count + chunk * size, min(size, count - chunk * size))
            own = tasks[rank::world]
            rollouts = player.play(own or tasks[:1])  # a process without tasks keeps in step
            made = [(rank + world * t.prompt, *self._pair(own[t.prompt]["row"], t)) for t in rollouts if own]
            everyone = sorted((entry for part in from_all_ranks(made) for entry in part), key=lambda entry: entry[0])
            pairs = [pair for _, pair, _ in everyone if pair is not None and not pair.identical]
            counts = {
                "sampled": len(everyone),
                "unfinished": sum(cut for *_, cut in everyone),
                "identical": sum(pair is not None and pair.identical for _, pair, _ in everyone),
            }
            buffer.append(number, step, chunk, pairs, counts)

    def _pair(self, row: int, rollout: Any) -> tuple[Pair | None, bool]:
        r = self.regime
        shown = r.data.demonstration(row)
        return make_pair(row, shown, rollout, r.data.stop_ids, r.round_config.unfinished), not rollout.finished

    def _own_pairs(self, number: int) -> list[Pair]:
        """Some of the round's pairs, for figures; refuses a round from which nothing can be learnt."""
        buffer, limit = self._buffer, self.regime.round_config.probe
        assert buffer is not None
        numbers, counts = buffer.select(number, "last"), buffer.counts
        if not len(numbers):
            raise UserError(
                f"round {number}: of {counts['sampled']} answers {counts['identical']} equal the demonstration and the "
                "others were cut off or empty, so no pair is left to learn from: raise sampling.temperature or "
                "sampling.max_new_tokens, or stop here: the policy may have learnt all there is"
            )
        if counts["identical"] > 0.2 * counts["sampled"]:
            rank_zero_warn(
                f"round {number}: {counts['identical']} of {counts['sampled']} answers equal the demonstration; those "
                "pairs teach nothing and are left out"
            )
        pairs = [buffer.pair(int(i)) for i in numbers[:limit]]
        same = len({p.rejected.tobytes() for p in pairs}) == 1 and len({p.prompt.tobytes() for p in pairs}) > 1
        if same and len(pairs) >= COLLAPSED:
            raise UserError(
                f"round {number}: the policy has collapsed, it answers every prompt alike: lower optim.lr, raise "
                "policy.kl or policy.entropy, or set rounds.max_round_kl, and go on from an earlier checkpoint"
            )
        return pairs

    @torch.no_grad()
    def _report_policy(self, pairs: Sequence[Pair], number: int) -> None:
        """How far the policy has moved, by its own answers; how likely demonstrations have become."""
        r, counts = self.regime, self._buffer.counts  # type: ignore[union-attr]
        now_N2 = self.logps(r.lm, pairs)
        figures = {"round": float(number), "expert_logp": float(now_N2[:, 0].mean())}
        if self.state.previous:
            with self.previous() as before:
                figures["kl_previous"] = float((now_N2 - self.logps(before, pairs))[:, 1].mean())
        if r.has_initial:
            with r.initial() as first:
                figures["kl_initial"] = float((now_N2 - self.logps(first, pairs))[:, 1].mean())
        for name in ("identical", "unfinished"):
            figures[name] = counts[name] / max(counts["sampled"], 1)
        figures["repeated_pairs"] = counts["repeated"] / max(counts["sampled"], 1)
        figures["answer_tokens"] = float(np.mean([len(p.rejected) for p in pairs]))
        figures["demonstration_tokens"] = float(np.mean([len(p.chosen) for p in pairs]))
        r.note(figures)

    def _measure(self) -> None:
        """Normalise the finished reward by its scores on demonstrations, and see what it goes by."""
        r, buffer, limit = self.regime, self._buffer, self.regime.round_config.probe
        assert buffer is not None
        shown = [r.data.demonstration(i) for i in range(min(limit, len(r.data)))]
        raw = r.scores([(d.prompt, d.answer) for d in shown])
        mean, std = float(raw.mean()), float(raw.std())
        if not std >= FLAT:
            raise UserError(
                f"round {self.state.number}: the reward gives {len(shown)} demonstrations the same score (deviation "
                f"{std:.1e}), so it cannot be normalised: give it more steps or a higher reward.lr, or fewer if it "
                "diverged"
            )
        r.set_scale(mean, std)
        fixed = tuple(((raw - mean) / std).tolist())
        pairs = [buffer.pair(int(i)) for i in buffer.select(self.state.number, "last")[:limit]]
        margin_N = self._margins(pairs)
        tokens_N2 = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
        endless_N = self._margins([_endless(p, r.data.stop_ids) for p in pairs])
        figures = {"reward_mean": mean, "reward_std": std, **watch.style(margin_N, tokens_N2, endless_N)}
        if self.state.fixed:
            gaps = [abs(a - b) for a, b in zip(fixed, self.state.fixed, strict=True)]
            figures["drift"] = sum(gaps) / len(gaps)
        if r.policy.kl:
            figures["contraction"] = watch.contraction(r.policy.kl * std)
        r.note(figures)
        r.start_critic()
        self.state = replace(self.state, measured=True, fixed=fixed, mean=mean, std=std)

    def _margins(self, pairs: Sequence[Pair]) -> Tensor:
        texts = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
        score_N2 = self.regime.scores(texts).view(-1, 2)
        return score_N2[:, 0] - score_N2[:, 1]

    # ---- pairs of a step ----

    def pairs_of(self, batch: Any) -> tuple[list[Pair], Tensor | None, int]:
        """This process's pairs of a micro-batch of the reward's.

        Args:
            batch: its place.

        Returns:
            The pairs, log-probabilities under an implicit reward's reference `[N, 2]`, and the pairs of the step.
        """
        r, buffer = self.regime, self._buffer
        assert buffer is not None
        rows, world = r.data.batch_rows, r.trainer.world_size
        size = rows * world * r.trainer.accumulate_grad_batches
        at = shuffled([r.data.seed, PAIRS, batch.round], batch.step * size, size, len(self.chosen))
        first = (batch.part * world + r.trainer.global_rank) * rows
        own = at[first : first + rows]
        reference = None if self.state.reference is None else self.state.reference[torch.from_numpy(own)]
        return [buffer.pair(int(i)) for i in self.chosen[own]], reference, size

    # ---- references ----

    @contextmanager
    def previous(self) -> Iterator[LanguageModel]:
        """The policy as it was at the start of the round, in place of the present one while the context lasts."""
        lm = self.regime.lm
        let_go(lm)
        weights = [_local(p) for p in self.regime.policy_parameters()]
        now, training = [w.detach().clone() for w in weights], lm.training

        def put(values: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for weight, value in zip(weights, values, strict=True):
                    weight.copy_(value)
            let_go(lm)

        put(self.state.previous)
        try:
            yield lm.eval()
        finally:
            put(now)
            lm.train(training)

    @torch.no_grad()
    def logps(self, lm: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        """Log-probabilities of demonstration and answer, `float32 [N, 2]` in main memory.

        Args:
            lm: the model.
            pairs: N of them.
        """
        training, size, found = lm.training, self.regime.data.batch_rows, []
        lm.eval()
        for i in range(0, len(pairs), size):
            pack = pair_pack(pairs[i : i + size]).to(self.regime.device)
            found.append(answer_logps(lm, pack).view(-1, 2).cpu())
        lm.train(training)
        return torch.cat(found)

    def _reference(self, chosen: np.ndarray) -> Tensor:
        """Log-probabilities of all chosen pairs under the reference, each process its share."""
        r, buffer = self.regime, self._buffer
        rank, world = r.trainer.global_rank, r.trainer.world_size
        assert buffer is not None
        share = -(-len(chosen) // world)
        own = [buffer.pair(int(i)) for i in np.resize(chosen, share * world)[rank::world]]
        if r.reward_config.reference == "previous":
            part = self.logps(r.lm, own)  # a round begins with the policy that it is held to
        else:
            with r.initial() as first:
                part = self.logps(first, own)
        return torch.stack(from_all_ranks(part), dim=1).flatten(0, 1)[: len(chosen)]

    # ---- brakes ----

    def settle(self, correct: float, count: float, phase: str) -> None:
        """Close an optimizer step: see whether its phase should end, and make the state what a checkpoint holds.

        Args:
            correct: pairs of this process that the reward told apart rightly in this step.
            count: of how many.
            phase: whose step it was.
        """
        r, c, state = self.regime, self.regime.reward_config, self.state
        if phase == "reward" and c.model == "network" and phase not in state.stopped:
            right, all_ = (sum(part) for part in zip(*from_all_ranks((correct, count)), strict=True))
            recent = (*state.recent, right / max(all_, 1))[-WINDOW:]
            stop = len(recent) == WINDOW and sum(recent) / WINDOW > c.stop_accuracy
            held_out = state.held_out
            if c.check_every and r.trainer.global_step % c.check_every == 0:
                held_out = (*held_out, r.held_out_accuracy())
                stop = stop or watch.falling(held_out, c.stop_drop)
            stopped = (*state.stopped, phase) if stop else state.stopped
            self.state = replace(state, recent=recent, held_out=held_out, stopped=stopped)
        self.settled = self.state
        train_all_adapters(r.lm)

    def stop(self, phase: str) -> None:
        """End a phase of the present round.

        Args:
            phase: which.
        """
        self.state = replace(self.state, stopped=(*self.state.stopped, phase))

    # ---- checkpoints ----

    def saved(self) -> dict[str, Any]:
        """The state as of the last step's end, as plain values. All processes call this together."""
        values = dict(vars(self.settled))
        if any(isinstance(p, DTensor) for p in self.regime.policy_parameters()):
            values["previous"] = from_all_ranks([w.cpu() for w in self.settled.previous])
        else:
            values["previous"] = [list(self.settled.previous)]
        values["pairs"] = from_all_ranks(self.settled.pairs)
        return values

    def load(self, values: dict[str, Any]) -> None:
        """Take a state up; the pairs themselves are looked for when training starts.

        Args:
            values: what `saved` gave.

        Raises:
            UserError: weights in shards are of another number of processes.
        """
        rank, world = self.regime.trainer.global_rank, self.regime.trainer.world_size
        shards, pairs = values["previous"], values["pairs"]
        if len(shards) not in (1, world):
            raise UserError(
                f"the checkpoint holds the start of its round in {len(shards)} shards; resume with as many processes"
            )
        mine = shards[rank] if len(shards) > 1 else shards[0]
        known = pairs[rank] if rank < len(pairs) else pairs[0]
        previous = tuple(w.to(self.regime.device) for w in mine)
        named = {name: tuple(values[name]) for name in ("stopped", "recent", "held_out", "fixed")}
        self.state = self.settled = RoundState(**{**values, **named, "previous": previous, "pairs": known})


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _endless(pair: Pair, stop_ids: Sequence[int]) -> Pair:
    """The pair without end tokens, where something is left without them."""

    def cut(answer: np.ndarray) -> np.ndarray:
        return answer[:-1] if len(answer) > 1 and int(answer[-1]) in stop_ids else answer

    return replace(pair, chosen=cut(pair.chosen), rejected=cut(pair.rejected))
