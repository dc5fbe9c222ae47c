"""Where the search meets Lightning: what a regime does so that its `fit` is a sequence of inner runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.core.resampling import refuse_without_rollouts
from lit_reason.core.run_folder import run_folder
from lit_reason.core.schedules import schedule_of
from lit_reason.errors import UserError
from lit_reason.regimes.shaping.held_out import FIRST_SEED, by_prompt, halves, objective
from lit_reason.regimes.shaping.inner_runs import InnerRuns
from lit_reason.regimes.shaping.token_rewards import TokenRewards
from lit_reason.rollout.policy_pack import over_rollouts
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

if TYPE_CHECKING:
    from lit_reason.core.actor_critic import ActorCriticRegime as Base
else:
    Base = object  # a mixin: the scan for regimes must find none here


class Searching(Base):
    """Mixed into a regime that has `inner`, the inner runs or None for an ordinary run, and `token_rewards`."""

    inner: InnerRuns | None
    token_rewards: TokenRewards
    digest: str  # of everything that decides what a trial comes to

    def setup(self, stage: str) -> None:
        """Take the length of the run from the search, where the recipe leaves it open.

        Raises:
            UserError: there are no held-out tasks to maximise on.
        """
        super().setup(stage)
        if self.inner is None or stage != "fit":
            return
        halves(self._data.tasks.get("val", ()), "test")
        self.inner.set_length(self.trainer)

    def configure_model(self) -> None:
        """Build the policy, and remember the weights that inner runs start from."""
        built = hasattr(self, "lm")
        super().configure_model()
        if self.inner is not None and not built:
            self.inner.remember_start(self)

    def configure_optimizers(self) -> Any:
        """As ever, but that each inner run has a schedule of its own."""
        made = super().configure_optimizers()
        if self.inner is not None:
            shapes = [schedule_of(group, self.optim_config) for group in made["optimizer"].param_groups]
            factors: list[Any] = [partial(self.inner.lr_factor, config=shape) for shape in shapes]
            made["lr_scheduler"]["scheduler"] = LambdaLR(made["optimizer"], factors)
        return made

    def on_train_start(self) -> None:
        """Open explainers and store."""
        player = self.player(self.sampling, self.dialogue)
        stop_ids = player.observations.stop_ids
        self.token_rewards.open(self._data.env, player.rewards, self.text_of, stop_ids, self.sampling.seed)
        if self.inner is not None:
            self.inner.open(self, run_folder(self.trainer), self.digest)

    def text_of(self, ids: Sequence[int]) -> str:
        """Tokens as text.

        Args:
            ids: of the tokens.
        """
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Between two rounds an inner run may end and the next one begin."""
        if self.inner is None or batch.number == self._round or self.inner.before_round(self):
            return None
        self.trainer.should_stop = True
        return -1

    def on_train_end(self) -> None:
        """Test the final run on prompts that the search has not seen."""
        if self.inner is not None:
            self.inner.finish(self)

    @torch.no_grad()
    def held_out(self, part: str, seed: int) -> dict[str, float]:
        """Figures on held-out prompts; the same draws in every inner run.

        Args:
            part: `validation` or `test`.
            seed: 0, or another for a rerun.

        Returns:
            `objective`, its `variance`, and the means `score`, `kl` and `length`.
        """
        assert self.inner is not None
        tasks, config = halves(self._data.tasks["val"], part), self.inner.config
        rank, world = self.trainer.global_rank, self.trainer.world_size
        own = tasks[rank::world] or tasks[:1]  # every process plays, for passes over sharded weights are in step
        sampling = dataclasses.replace(self.sampling, seed=FIRST_SEED + self.sampling.seed + seed)
        player = self.player(sampling, dataclasses.replace(self.dialogue, group=config.eval_group))
        rollouts = player.play(own, policy_version=self.trainer.global_step)
        refuse_without_rollouts(rollouts)
        kls = self._kl(rollouts) if config.kl else [0.0] * len(rollouts)
        sound = [(t, kl) for t, kl in zip(rollouts, kls, strict=True) if not t.failure and tasks[rank::world]]
        figures = {
            "score": self.token_rewards.scores([t for t, _ in sound], own),
            "kl": [kl for _, kl in sound],
            "length": [float(t.sampled) for t, _ in sound],
        }
        return objective(by_prompt([t.prompt for t, _ in sound], figures), config.kl)

    def _kl(self, rollouts: list[Trajectory]) -> list[float]:
        """Log-ratio of the policy to the one before training, summed over each answer: unbiased for the divergence."""
        played = [t for t in rollouts if t.ids]
        if not played:
            raise UserError("search: no held-out prompt could be answered")
        with self.lm.as_reference() as reference:
            found = iter(over_rollouts(played, 1, lambda pack: self._logp_T(reference, pack)))
        return [_log_ratio(t, next(found)) if t.ids else 0.0 for t in rollouts]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the search."""
        super().on_save_checkpoint(checkpoint)
        if self.inner is not None:
            checkpoint["search"] = self.inner.state(self.trainer.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the search."""
        super().on_load_checkpoint(checkpoint)
        if self.inner is not None and "search" in checkpoint:
            self.inner.load(checkpoint["search"])


def _log_ratio(t: Trajectory, ref_logp_T: torch.Tensor) -> float:
    sampled_T = torch.tensor(t.turn_id) != NOT_SAMPLED
    return float((torch.tensor(t.logprob, dtype=torch.float64) - ref_logp_T.double())[sampled_T].sum())
