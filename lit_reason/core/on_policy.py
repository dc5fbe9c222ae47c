"""OnPolicyRegime: what every method inherits that learns from its own rollouts.

A round plays each task of a batch with the present weights, says what every token was worth, and takes one or more
optimizer steps on the sampled tokens. The data module hands out each batch once for every micro-batch of its round, so
accumulation, clipping and checkpoints stay the trainer's own.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lit_reason.core.config import OptimConfig
from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.regime import Regime
from lit_reason.core.run_folder import run_folder
from lit_reason.data.rendering.stop_tokens import known_stop_ids
from lit_reason.envs.task_data import TaskBatch
from lit_reason.errors import UserError
from lit_reason.kernels import epilogues
from lit_reason.metrics.means import Means
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backends import backend_for
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.observations import ObservationEncoder
from lit_reason.rollout.play import Player
from lit_reason.rollout.policy_pack import Credited, PolicyPack, loss_weights, policy_packs
from lit_reason.rollout.trajectory import Trajectory, write_ledger

UPDATE_FIGURES = ("loss", "ratio", "clipped", "kl", "entropy", "logprob_gap")
ROUND_FIGURES = (
    *("reward", "turn_reward", "outcome", "turns", "sampled_tokens"),
    *("finished", "failed", "tool_errors", "dead_groups"),
)


@dataclass(frozen=True)
class PolicyConfig:
    """The loss of a round of rollouts.

    Args:
        loss: `ppo` the clipped surrogate (arXiv 1707.06347, equation 7); `cispo` bounds the ratio and drops no token
            (arXiv 2506.13585); `reinforce` has no ratio, for one update a round.
        clip_low: room of the ratio below 1.
        clip_high: room of the ratio above 1; more than below is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: bound of terms with negative advantage, above 1; null for none.
        average: whose mean the loss is: of all sampled `token`s of the batch (DAPO), of `sequence`s, each the mean of
            its own tokens (GRPO, arXiv 2402.03300), or a `constant` divisor (Dr. GRPO, arXiv 2503.20783).
        updates: policy updates a round; from the second on the rollouts are off-policy.
        truncated: rollouts that a limit cut off: `keep` them in the loss or `mask` them.
        kl: weight of the KL divergence to the model before training (k3 estimate, arXiv 2402.03300, equation 4); 0
            needs no reference. With an adapter the reference is the model without it, otherwise a frozen copy.
        entropy: weight of the entropy bonus.
    """

    loss: Literal["ppo", "cispo", "reinforce"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    average: Literal["token", "sequence", "constant"] = "token"
    updates: int = 1
    truncated: Literal["keep", "mask"] = "keep"
    kl: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise UserError(f"policy.updates is {self.updates}; it must be at least 1")
        if self.loss == "reinforce" and self.updates > 1:
            raise UserError("policy.loss reinforce has no ratio and is wrong off-policy: set policy.updates to 1")


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
        self._round = -1
        self._packs: list[PolicyPack] = []

    @abstractmethod
    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """What each token of each rollout was worth.

        Args:
            rollouts: all of a round on this process, group after group.

        Returns:
            One entry a rollout, in order; loss weights are set by the caller.
        """

    def further_loss(self, hidden_TD: torch.Tensor, pack: PolicyPack) -> torch.Tensor | float:
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

    def training_step(self, batch: TaskBatch, batch_idx: int) -> torch.Tensor:
        """One micro-batch of the present round's rollouts; the first of a round plays them."""
        if batch.number != self._round:
            self._round, self._packs = batch.number, self.play_round(batch)
        pack = self._packs[batch.part % len(self._packs)].to(self.device)
        hidden = self.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
        out = self.lm.head(
            hidden[pack.index],
            pack.targets,
            pack.target_weight,
            temperature=self.sampling.temperature,
            loss=self.policy_loss(pack),
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
        # Another seed each round: a task that comes again meets other draws.
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed * 1_000_003 + batch.number)
        rollouts = self.player(sampling, self.dialogue).play(
            batch.tasks, policy_version=self.trainer.global_step, seed=batch.number, progress=True
        )
        self.record_round(self.round_meter, rollouts)
        if self.dialogue.keep_every and batch.number % self.dialogue.keep_every == 0:
            rank = self.trainer.global_rank
            name = "rollouts.jsonl" if rank == 0 else f"rollouts-{rank}.jsonl"
            folder = run_folder(self.trainer)
            folder.mkdir(parents=True, exist_ok=True)
            write_ledger(folder / name, rollouts)
        rollouts = [t for t in rollouts if t.ids]  # one that could not begin is counted, and nothing more
        c = self.policy
        weights, own = loss_weights(rollouts, c.average, longest=self.dialogue.total_tokens, truncated=c.truncated)
        norm = sum(from_all_ranks(own)) or 1.0  # nothing to train on anywhere: the loss is 0 all the same
        credited = [dataclasses.replace(r, weight=w) for r, w in zip(self.credited(rollouts), weights, strict=True)]
        packs = policy_packs(credited, self.trainer.accumulate_grad_batches, norm)
        return [dataclasses.replace(pack, ref_logp=self._reference_logp(pack)) for pack in packs] if c.kl else packs

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

    def policy_loss(self, pack: PolicyPack) -> epilogues.Epilogue:
        """The loss of each sampled token as a function of its log-probability and entropy.

        Args:
            pack: the tokens.
        """
        c = self.policy
        if c.loss == "ppo":
            clip: Any = {"clip_low": c.clip_low, "clip_high": c.clip_high, "dual_clip": c.dual_clip}
            terms = [epilogues.ppo_clip(pack.advantage, pack.old_logp, **clip)]
        elif c.loss == "cispo":
            terms = [epilogues.cispo(pack.advantage, pack.old_logp, clip_high=c.clip_high)]
        else:
            terms = [epilogues.reinforce(pack.advantage)]
        if pack.ref_logp is not None:
            terms.append(epilogues.k3_kl(c.kl, pack.ref_logp))
        if c.entropy:
            terms.append(epilogues.entropy_bonus(c.entropy))
        return epilogues.total(*terms)

    def reference(self) -> AbstractContextManager[LanguageModel]:
        """The model that `policy.kl` holds the policy to, for as long as the context lasts."""
        return self.lm.as_reference()

    @torch.no_grad()
    def _reference_logp(self, pack: PolicyPack) -> torch.Tensor:
        moved = pack.to(self.device)
        with self.reference() as reference:
            hidden = reference.hidden(moved.ids, moved.positions, moved.cu_seqlens)
            return reference.head(hidden[moved.index], moved.targets, temperature=self.sampling.temperature).logp_S

    # ---- checkpoints between two updates of one round ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rollouts of a round that is not used up: the weights that sampled them are gone."""
        super().on_save_checkpoint(checkpoint)
        if self.trainer.global_step % self.policy.updates:
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
        meter.update("logprob_gap", (out.logp_S - pack.old_logp)[trained].abs())
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
            "tool_errors": [t.facts["errors"] for t in sound],
        }
        for name, values in figures.items():
            meter.update(name, values)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the figures of the update and of the rounds since the last time."""
        every = getattr(self.trainer, "log_every_n_steps", 0)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log_meter(self.update_meter, "train")
            self.log_meter(self.round_meter, "train")

    # ---- held-out tasks ----

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Play held-out tasks, once each."""
        dialogue = dataclasses.replace(self.dialogue, group=1)
        rollouts = self.player(self.sampling, dialogue).play(batch.tasks, policy_version=self.trainer.global_step)
        self.record_round(self.val_round_meter, rollouts)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the held-out tasks."""
        self.log_meter(self.val_round_meter, "val")
