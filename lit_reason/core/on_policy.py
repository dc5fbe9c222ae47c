"""OnPolicyRegime: what every method inherits that learns from its own rollouts.

A round plays each task of a batch with the present weights, says what every token was worth, and takes one or more
optimizer steps on the sampled tokens. The data module hands out each batch once for every micro-batch of its round, so
accumulation, clipping and checkpoints stay the trainer's own.

What a subclass decides: `rewarded` brings rewards of its own, `credited` says what they are worth token by token,
`further_loss` adds to the loss. The rest of a round, in `play_round`, is the same for all.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_reason.core.config import OptimConfig
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.core.policy_loss import policy_loss
from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.regime import Regime
from lit_reason.core.resampling import refuse_without_rollouts, untrained, with_spread
from lit_reason.core.round_rewards import divergence, divergence_paid, length_paid
from lit_reason.core.run_folder import run_folder
from lit_reason.data.packing import Pack
from lit_reason.data.rendering.stop_tokens import known_stop_ids
from lit_reason.envs.task_data import TaskBatch
from lit_reason.errors import UserError
from lit_reason.metrics.means import Means
from lit_reason.metrics.turn_credit import TurnCredit
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backends import backend_for
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.observations import ObservationEncoder
from lit_reason.rollout.play import Player
from lit_reason.rollout.policy_pack import Credited, PolicyPack, loss_weights, over_rollouts, policy_packs
from lit_reason.rollout.sampler import generating
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory, write_ledger

UPDATE_FIGURES = ("loss", "ratio", "clipped", "kl", "entropy", "logprob_gap")
ROUND_FIGURES = (
    *("reward", "turn_reward", "outcome", "turns", "sampled_tokens"),
    *("finished", "failed", "tool_calls", "tool_errors", "dead_groups", "resampled"),
)
TURNS_TOLD_APART = 8  # in figures of credit
MOST_GAP = 0.25  # nats between sampler and trainer on average, beyond which something is wrong


class OnPolicyRegime(Regime):
    """Rounds of rollouts, and the policy's loss on them. A method says what each token was worth (`credited`).

    Args:
        lm: the policy.
        optim: optimizer and schedule.
        sampling: how the policy samples; temperature 1 without truncation is the policy itself.
        dialogue: rollouts a task, and their limits.
        policy: the loss.
    """

    learns = ("train/reward", "rises")

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig,
        sampling: SamplingConfig,
        dialogue: DialogueConfig,
        policy: PolicyConfig,
    ) -> None:
        super().__init__(lm, optim, sampling)
        self.dialogue, self.policy = dialogue, policy
        self.update_meter, self.round_meter = Means(UPDATE_FIGURES), Means(ROUND_FIGURES)
        self.val_round_meter = Means(ROUND_FIGURES)
        self.credit_meter = TurnCredit(min(dialogue.max_turns + 1, TURNS_TOLD_APART))
        self._round = -1
        self._packs: list[PolicyPack] = []

    def rewarded(self, rollouts: list[Trajectory]) -> list[Trajectory]:
        """Rollouts with the rewards to learn from; by default those that the environment paid.

        A method with a reward of its own puts it in place of these, and everything behind sees it: figures, ledger,
        resampling, credit. `dataclasses.replace(t, turn_terms=[...], outcome_terms={...})` pays turns and the whole, by
        names that the ledger keeps; `token_rewards=[...]` pays token by token and stands in place of both.

        Args:
            rollouts: all of a round on this process, group after group, failed ones included.

        Returns:
            As many, in the same order.
        """
        return rollouts

    @abstractmethod
    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """What each token of each rollout was worth.

        Args:
            rollouts: all of a round on this process, group after group.

        Returns:
            One entry a rollout, in order; loss weights are set by the caller.
        """

    def further_loss(self, hidden_TD: Tensor, pack: PolicyPack) -> Tensor | float:
        """What a method adds to the policy's loss, as a sum weighted like it; nothing by default.

        Args:
            hidden_TD: last hidden states of the pack.
            pack: its tokens.
        """
        return 0.0

    def setup(self, stage: str) -> None:
        """Tell the data module how many updates a round makes.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: the data module hands out no tasks.
        """
        if not hasattr(self._data, "updates"):
            raise UserError(
                f"{type(self).__name__} needs tasks to play: use data TaskData, not {type(self._data).__name__}"
            )
        self._data.updates = self.policy.updates

    # ---- rounds ----

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the present round's rollouts; the first of a round plays them."""
        if batch.number != self._round:
            self._round, self._packs = batch.number, self.play_round(batch)
        pack = self._packs[batch.part % len(self._packs)].to(self.device)
        hidden = self.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
        logp_S = None
        if self.policy.ratio != "token":  # a span's ratio must be known before the loss of its first token
            logp_S = self._logp(self.lm, pack, hidden.detach())
        out = self.lm.head(
            hidden[pack.index],
            pack.targets,
            pack.target_weight,
            temperature=self.sampling.temperature,
            loss=policy_loss(self.policy, pack, logp_S),
        )
        self._record_update(out, pack)
        return self.normalise(out.loss_sum + self.further_loss(hidden, pack), pack)

    def play_round(self, batch: TaskBatch) -> list[PolicyPack]:
        """Rollouts of a batch of tasks, credited and packed.

        Args:
            batch: the tasks.

        Returns:
            One pack for each accumulated micro-batch.
        """
        rollouts = self._with_spread(self._play(batch.tasks, batch.number), batch)
        self.record_round(self.round_meter, rollouts)
        if not any(t.ids for t in rollouts):  # other processes have some, and passes over sharded weights are in step
            rollouts[0] = untrained(rollouts[0])
        rollouts = self._shaped(rollouts)
        unplayed = [t for t in rollouts if not t.ids]  # those that could not begin are counted, and nothing more
        rollouts = [t for t in rollouts if t.ids]
        c = self.policy
        weights, own = loss_weights(rollouts, c.average, longest=self.dialogue.total_tokens, truncated=c.truncated)
        norm = sum(from_all_ranks(own)) or 1.0  # nothing to train on anywhere: the loss is 0 all the same
        credited = [dataclasses.replace(r, weight=w) for r, w in zip(self.credited(rollouts), weights, strict=True)]
        self._record_credit(credited, unplayed, batch.number)
        packs = policy_packs(credited, self.trainer.accumulate_grad_batches, norm)
        if c.importance != "none":
            with generating(self.lm.hf):  # without dropout, as the sampler was
                packs = [dataclasses.replace(p, start_logp=self._logp(self.lm, p.to(self.device)).cpu()) for p in packs]
        if c.kl and c.kl_in == "loss":
            with self.reference() as reference:
                packs = [dataclasses.replace(p, ref_logp=self._logp(reference, p.to(self.device))) for p in packs]
        return packs

    def _play(self, tasks: Sequence[dict[str, Any]], number: int, attempt: int = 0) -> list[Trajectory]:
        """Rewarded rollouts of some tasks; other draws each round and each attempt, also of a task that comes again."""
        seed = (self.sampling.seed * 1_000_003 + number) * (self.policy.resample + 1) + attempt
        player = self.player(dataclasses.replace(self.sampling, seed=seed), self.dialogue)
        version = self.trainer.global_step
        return self.rewarded(player.play(tasks, policy_version=version, seed=seed, progress=True))

    def _with_spread(self, rollouts: list[Trajectory], batch: TaskBatch) -> list[Trajectory]:
        """Rollouts in which groups without spread are replaced by those of other tasks, `policy.resample` times.

        Raises:
            UserError: every rollout failed, of all attempts and on all processes.
        """

        def play(dead: list[int], attempt: int) -> list[Trajectory]:
            others = self._data.others([batch.tasks[i] for i in dead or [0]], batch.number, attempt)
            return self._play(others, batch.number, attempt)

        found = with_spread(rollouts, self.dialogue.group, self.policy.resample, play)
        self.round_meter.update("resampled", [found.replaced / len(batch.tasks)])
        self.round_meter.update("failed", [float(bool(t.failure)) for t in found.dropped])
        refuse_without_rollouts([*found.rollouts, *found.dropped], found.attempts)
        return found.rollouts

    def _shaped(self, rollouts: list[Trajectory]) -> list[Trajectory]:
        """Rollouts that also pay for length and divergence, where the recipe says so."""
        c = self.policy
        rollouts = [length_paid(t, c, self.dialogue.total_tokens) for t in rollouts]
        played = [i for i, t in enumerate(rollouts) if t.ids]
        if not c.kl or c.kl_in != "reward":
            return rollouts
        with self.reference() as reference:
            parts = self.trainer.accumulate_grad_batches
            ref = over_rollouts([rollouts[i] for i in played], parts, lambda pack: self._logp_T(reference, pack))
        for i, ref_logp_T in zip(played, ref, strict=True):
            kl_T = divergence(rollouts[i], ref_logp_T, c.kl_estimate)
            self.update_meter.update("kl", kl_T[torch.tensor(rollouts[i].turn_id) != NOT_SAMPLED])
            rollouts[i] = divergence_paid(rollouts[i], kl_T, c.kl)
        return rollouts

    def player(self, sampling: SamplingConfig, dialogue: DialogueConfig) -> Player:
        """Plays tasks of the data module with the present weights.

        Args:
            sampling: how the policy samples.
            dialogue: limits.
        """
        stop_ids = known_stop_ids(self.tokenizer, self.lm.eos_ids)
        observations = ObservationEncoder(self.tokenizer, stop_ids, dialogue.observation_role)
        backend = backend_for(dialogue.backend, self.lm, self.tokenizer, sampling, observations.stop_ids)
        return Player(backend, observations, self._data.env, dialogue, self._data.rewards)

    def reference(self) -> AbstractContextManager[LanguageModel]:
        """The model that `policy.kl` holds the policy to, for as long as the context lasts."""
        return self.lm.as_reference()

    @torch.no_grad()
    def _logp(self, lm: LanguageModel, pack: Pack, hidden_TD: Tensor | None = None) -> Tensor:
        """Log-probability of each sampled token of a pack by a model, `[S]`."""
        hidden = lm.hidden(pack.ids, pack.positions, pack.cu_seqlens) if hidden_TD is None else hidden_TD
        return lm.head(hidden[pack.index], pack.targets, temperature=self.sampling.temperature).logp_S

    def _logp_T(self, lm: LanguageModel, pack: Pack) -> Tensor:
        """The same at each token of the pack, 0 where none was sampled."""
        moved = pack.to(self.device)
        logp_S = self._logp(lm, moved)
        return logp_S.new_zeros(len(moved.ids)).index_put((moved.index + 1,), logp_S)

    # ---- checkpoints between two updates of one round ----

    def between_updates(self) -> bool:
        """Whether rollouts wait for a further update."""
        return bool(self.trainer.global_step % self.policy.updates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rollouts of a round that is not used up: the weights that sampled them are gone."""
        super().on_save_checkpoint(checkpoint)
        if self.between_updates():
            checkpoint["round"] = from_all_ranks({"number": self._round, "packs": [vars(p) for p in self._packs]})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the round that was under way.

        Raises:
            UserError: its rollouts were dealt to another number of processes.
        """
        super().on_load_checkpoint(checkpoint)
        rounds = checkpoint.get("round")
        if rounds is None:
            return
        if len(rounds) != self.trainer.world_size:
            raise UserError(
                f"the checkpoint lies between two updates on rollouts of {len(rounds)} processes; resume with as many, "
                f"or from a step that is a multiple of policy.updates={self.policy.updates}"
            )
        own = rounds[self.trainer.global_rank]
        self._round, self._packs = own["number"], [PolicyPack(**fields) for fields in own["packs"]]

    # ---- figures ----

    def _record_update(self, out: Any, pack: PolicyPack) -> None:
        meter, trained = self.update_meter, pack.target_weight != 0
        meter.update("loss", out.loss_sum[None], pack.norm / self.micro_batches)
        meter.update("entropy", out.entropy_S[trained])
        gap = (out.logp_S - pack.old_logp)[trained].abs()
        meter.update("logprob_gap", gap)
        if (
            not self.between_updates()
            and self.policy.importance == "none"
            and len(gap)
            and float(gap.mean()) > MOST_GAP
        ):
            warnings.warn(
                "before any update the trainer's log-probabilities differ from the sampler's by "
                f"{float(gap.mean()):.2f} nats on average: wrong weights, another temperature, or much dropout; the "
                "ratio is not to be trusted (policy.importance corrects small differences)",
                stacklevel=2,
            )
        for name in ("ratio", "clipped", "kl"):
            if name in out.metrics:
                meter.update(name, out.metrics[name][trained])

    def record_round(self, meter: Means, rollouts: list[Trajectory]) -> None:
        """Add the figures of a round.

        Args:
            meter: takes them.
            rollouts: all of the round on this process.
        """
        sound = [t for t in rollouts if not t.failure]
        meter.update("failed", [float(bool(t.failure)) for t in rollouts])
        figures: dict[str, list[float]] = {
            "turn_reward": [sum(t.turn_rewards) for t in sound],
            "outcome": [t.outcome for t in sound],
            "reward": [sum(t.turn_rewards) + t.outcome for t in sound],
            "turns": [len(t.stops) for t in sound],
            "sampled_tokens": [t.sampled for t in sound],
            "finished": [t.finished for t in sound],
            "tool_calls": [t.facts.get("calls", 0) for t in sound],
            "tool_errors": [t.facts["errors"] for t in sound],
        }
        paid: list[Counter[str]] = [Counter() for _ in sound]
        for terms, t in zip(paid, sound, strict=True):
            for part in (*t.turn_terms, t.outcome_terms):
                terms.update(part)
        meter.also((f"paid/{name}" for terms in paid for name in terms), like="reward")
        for name in meter.names:
            if name.startswith("paid/"):
                figures[name] = [terms[name.removeprefix("paid/")] for terms in paid]
        for name, values in figures.items():
            meter.update(name, values)

    def _record_credit(self, credited: list[Credited], unplayed: list[Trajectory], number: int) -> None:
        """Add up how credit lies over turns, and write the ledger of every so many rounds."""
        for r in credited:
            t = r.trajectory
            self.credit_meter.update(r.advantage_T, torch.tensor(t.turn_id), torch.tensor(t.logprob), r.weight)
        if self.dialogue.keep_every and number % self.dialogue.keep_every == 0:
            file = self._ledger("rollouts")
            file.parent.mkdir(parents=True, exist_ok=True)
            worth = [dataclasses.replace(r.trajectory, advantage=r.advantage_T.float().tolist()) for r in credited]
            write_ledger(file, sorted([*worth, *unplayed], key=lambda t: (t.prompt, t.rollout)))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the figures of the update and of the rounds since the last time."""
        every = getattr(self.trainer, "log_every_n_steps", 0)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log_meter(self.update_meter, "train")
            self._log_rounds(self.round_meter, "train")
            self.log_meter(self.credit_meter, "credit")

    def _log_rounds(self, meter: Means, prefix: str) -> None:
        """Log figures of rounds; a reward that was paid on one process alone is a figure on all."""
        if meter.update_called:
            meter.also({name for names in from_all_ranks(meter.names) for name in names}, like="reward")
        self.log_meter(meter, prefix)

    # ---- held-out tasks ----

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Play held-out tasks, once each."""
        self._play_held_out(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the held-out tasks."""
        self._log_rounds(self.val_round_meter, "val")

    def on_test_start(self) -> None:
        """Begin the file of rollouts anew."""
        run_folder(self.trainer).mkdir(parents=True, exist_ok=True)
        self._ledger("test-rollouts").unlink(missing_ok=True)

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Play the test's tasks, once each, and keep the rollouts in `test-rollouts.jsonl`."""
        write_ledger(self._ledger("test-rollouts"), self._play_held_out(batch))

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test's tasks."""
        self._log_rounds(self.val_round_meter, "test")

    def _play_held_out(self, batch: TaskBatch) -> list[Trajectory]:
        """Rollouts of held-out tasks, one each; their figures are added up."""
        player = self.player(self.sampling, dataclasses.replace(self.dialogue, group=1))
        rollouts = player.play(batch.tasks, policy_version=self.trainer.global_step, progress=True)
        refuse_without_rollouts(rollouts)
        self.record_round(self.val_round_meter, rollouts)
        return rollouts

    def _ledger(self, name: str) -> Path:
        """The file of rollouts of this process."""
        rank = self.trainer.global_rank
        return run_folder(self.trainer) / (f"{name}.jsonl" if rank == 0 else f"{name}-{rank}.jsonl")
