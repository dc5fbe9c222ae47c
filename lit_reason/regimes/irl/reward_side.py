"""What stands beside the policy in inverse RL: the reward model, its optimizer, scores, and state in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_reason.core.actor_critic import ActorCriticRegime
from lit_reason.core.optim import build_optimizer
from lit_reason.core.ranks import from_all_ranks
from lit_reason.data.packing import pack_rows
from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.reward import REWARD_ADAPTER, RewardModel, add_reward_adapter, let_go, train_all_adapters
from lit_reason.regimes.irl import watch
from lit_reason.regimes.irl.answers import AnswerPlayer, answer_logps, pay, text_row
from lit_reason.regimes.irl.config import RewardConfig, RoundConfig, check_together
from lit_reason.regimes.irl.demonstrations import DemonstrationData, RoundBatch, RoundPlan, with_steps
from lit_reason.regimes.irl.held_out import HeldOutPair, PairMeter, by_kind
from lit_reason.regimes.irl.rates import with_reward
from lit_reason.regimes.irl.rounds import Rounds
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.policy_pack import PolicyPack
from lit_reason.rollout.trajectory import Trajectory


class RewardSide(ActorCriticRegime):
    """A policy, perhaps a critic, and a reward that is trained in turn with them. `prepare` ends its construction.

    Attributes:
        reward: the reward model; absent where the reward is the policy itself.
        rounds: the phases, and what they remember.
        place: the present micro-batch's place in the run.
    """

    reward: RewardModel
    place: RoundBatch | None

    def prepare(self, rounds: RoundConfig, reward: RewardConfig) -> None:
        """Take the settings of the reward's side.

        Args:
            rounds: what happens in a round.
            reward: the reward, and how it learns.

        Raises:
            UserError: they contradict each other.
        """
        check_together(rounds, reward, self.lm_config, self.critic_config)
        if rounds.policy_steps % self.policy.updates:
            raise UserError(
                f"rounds.policy_steps is {rounds.policy_steps}; it must be a multiple of policy.updates "
                f"({self.policy.updates}), or a round would end between two updates"
            )
        if self.policy.resample:
            raise UserError("policy.resample plays other tasks in place of some; IRLRegime has no others: set it to 0")
        self.round_config, self.reward_config = rounds, reward
        self.rounds, self.place = Rounds(self), None
        self.pair_meter = PairMeter()
        self._tally = (0.0, 0.0)
        self._without_gradient: list[nn.Parameter] = []
        self._between = False
        self._held_out: list[HeldOutPair] | None = None

    # ---- set-up ----

    @property
    def data(self) -> DemonstrationData:
        """The run's demonstrations."""
        return self._data

    def setup(self, stage: str) -> None:
        """Tell the data module how long rounds are, and warn of settings that bend the gradient."""
        c = self.round_config
        with_steps(self._data, RoundPlan(c.reward_steps, c.policy_steps, self.policy.updates))
        self.pair_meter = PairMeter(tuple(by_kind(self.data.pairs_file)))
        self.dialogue = DialogueConfig(
            group=c.group, turn_tokens=self.sampling.max_new_tokens, total_tokens=self.data.max_length
        )
        if stage == "fit" and (self.sampling.temperature != 1 or self.sampling.top_p != 1 or self.sampling.top_k):
            rank_zero_warn(
                "sampling is not the policy itself (temperature 1, top_p 1, top_k 0): the reward then learns against "
                "another distribution than the one whose gradient it stands for"
            )

    def configure_model(self) -> None:
        """Build policy, critic and reward once."""
        super().configure_model()
        if self.reward_config.model == "policy" or hasattr(self, "reward"):
            return
        self.reward = RewardModel.beside(self.lm, self.lm_config, self.reward_config.path)
        if self.reward.trunk is not None:
            self.spread(self.reward.trunk)
        if self.device_mesh is not None:
            self.reward.shard(self.device_mesh["data_parallel"])

    def spread(self, lm: LanguageModel) -> None:
        """Lay weights over the processes; a base that policy and reward share first gets the reward's adapter."""
        c = self.reward_config
        if lm is self.lm and self.lm_config.adapter is not None and c.model == "network" and c.path is None:
            add_reward_adapter(lm)
        super().spread(lm)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the policy."""
        named = self.lm.named_parameters()
        return [p for name, p in named if p.requires_grad and f".{REWARD_ADAPTER}." not in name]

    def reward_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the reward; none where it is the policy."""
        own = [p for p in self.reward.parameters() if p.requires_grad] if hasattr(self, "reward") else []
        return own + [p for name, p in self.lm.named_parameters() if f".{REWARD_ADAPTER}." in name]

    def configure_optimizers(self) -> Any:
        """One optimizer, two rates: the policy's and the reward's, each with its schedule over its steps of a round."""
        own = self.reward_parameters()
        for parameter in own:
            parameter.requires_grad_(False)
        policy = build_optimizer(self, self.optim_config, self.own_rates())
        for parameter in own:
            parameter.requires_grad_(True)
        optimizer, schedule = with_reward(policy, own, self.optim_config, self.reward_config, self.round_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def restart_reward(self, number: int) -> None:
        """Begin the reward of a round: with first weights and a new head, or where it is; with no momentum either way.

        Args:
            number: of the round.
        """
        if self.reward_config.model == "policy" or number == 0:
            return
        if self.reward_config.start == "fresh":
            self.reward.restart(number)
        let_go(self.reward)
        let_go(self.reward.lm)
        self._forget(self.reward_parameters())

    def start_critic(self) -> None:
        """Begin the critic of a round as its finished reward, normalised, where the recipe says so."""
        if self.round_config.critic_start != "reward":
            return
        reward, critic = self.reward, self.critic
        for part in (reward, reward.lm, critic, critic.trunk):
            let_go(part)  # type: ignore[arg-type]
        critic.begin_as(reward.lm, reward.score.weight / reward.std, -reward.mean / reward.std)
        self._forget(list(critic.parameters()))

    def _forget(self, parameters: list[nn.Parameter]) -> None:
        """Drop the momentum of weights that begin anew."""
        for parameter in parameters:
            self.trainer.optimizers[0].state.pop(parameter, None)

    # ---- one optimizer for two models ----

    def unused(self, phase: str) -> Tensor | float:
        """Zero; under ddp it depends on the weights that a phase leaves alone, as ddp waits for gradients of all.

        Args:
            phase: the one under way.
        """
        reward = self.reward_parameters()
        trained = {id(p) for p in reward} if phase == "reward" and reward else None
        everything = [p for p in self.parameters() if p.requires_grad]
        others = reward if trained is None else [p for p in everything if id(p) not in trained]
        return self._touch(others)

    def rest(self) -> Tensor:
        """The loss of a step in which nothing is trained."""
        self.update_meter.update("loss", [0.0])
        self.update_meter.update("resting", [1.0])
        touched = self._touch([p for p in self.parameters() if p.requires_grad])
        return touched if isinstance(touched, Tensor) else torch.zeros((), device=self.device, requires_grad=True)

    def _touch(self, parameters: list[nn.Parameter]) -> Tensor | float:
        self._without_gradient = parameters
        if not isinstance(self.trainer.strategy, DDPStrategy) or not parameters:
            return 0.0
        return torch.stack([0.0 * p.sum() for p in parameters]).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Weights that this step leaves alone have no gradient at all, so that no momentum moves them."""
        for parameter in self._without_gradient:
            parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step; then look at the brakes, and close the step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        assert self.place is not None
        self.rounds.settle(*self._tally, self.place.phase)
        self._tally, self._between = (0.0, 0.0), self._rollouts_left()

    def record_margins(self, loss: Tensor, margin_N: Tensor, norm: float) -> None:
        """Figures of a micro-batch of the reward.

        Args:
            loss: its summed loss.
            margin_N: its margins.
            norm: pairs in the step.

        Raises:
            UserError: the loss is not a number.
        """
        if not torch.isfinite(loss):
            assert self.place is not None
            raise UserError(
                f"round {self.place.round}, reward step {self.place.step}: the reward's loss is {float(loss)}: lower "
                "reward.lr; a linear loss has no lower bound and needs few steps, or reward.chi2"
            )
        right = watch.accuracy(margin_N)
        for name in ("loss", "reward_loss"):
            self.update_meter.update(name, loss[None], norm / self.micro_batches)
        self.update_meter.update("pair_accuracy", right)
        self.update_meter.update("margin", margin_N)
        self._tally = (self._tally[0] + float(right.sum()), self._tally[1] + len(right))

    def note(self, figures: dict[str, float]) -> None:
        """Log figures with those of the present step.

        Args:
            figures: by name, of `watch.FIGURES`.
        """
        for name, value in figures.items():
            self.update_meter.update(name, [value])

    # ---- answers and scores ----

    def answer_player(self, sampling: SamplingConfig, group: int) -> AnswerPlayer:
        """Answers prompts with the present weights.

        Args:
            sampling: how.
            group: answers to each.
        """
        engine = Engine(self.lm, self.tokenizer, sampling, self.data.stop_ids)
        longest, total = sampling.max_new_tokens, self.data.max_length
        return AnswerPlayer(engine, group=group, answer_tokens=longest, total_tokens=total, batch=sampling.batch_size)

    @torch.no_grad()
    def scores(self, texts: Sequence[tuple[Any, Any]]) -> Tensor:
        """The reward model's raw scores, `float32 [texts]` in main memory.

        Args:
            texts: tokens of prompts and answers.
        """
        lm, size, found = self.reward.lm, 2 * (self.data.batch_rows or 1), []
        training = lm.training
        lm.eval()
        for i in range(0, len(texts), size):
            pack = pack_rows([text_row(*text) for text in texts[i : i + size]]).to(self.device)
            found.append(self.reward(pack.ids, pack.positions, pack.cu_seqlens).cpu())
        lm.train(training)
        return torch.cat(found)

    def scored(self, rollouts: list[Trajectory]) -> list[Trajectory]:
        """Rollouts with their normalised scores as rewards.

        Args:
            rollouts: of one turn each.

        Raises:
            UserError: a score is not finite.
        """
        starts = [t.ids[: t.turn_id.index(0)] if t.sampled else t.ids for t in rollouts]
        texts = [(s, t.ids[len(s) :]) for s, t in zip(starts, rollouts, strict=True)]
        score = self.reward.normalised(
            self.scores([(torch.tensor(a).numpy(), torch.tensor(b).numpy()) for a, b in texts])
        )
        if not score.isfinite().all():
            raise UserError(
                "the reward model gives scores that are not finite: lower reward.lr, and begin this round anew"
            )
        no_end = self.round_config.no_end_reward
        self.note(watch.endings(score.tolist(), [t.finished for t in rollouts], no_end))
        return pay(rollouts, score.tolist(), no_end)

    def set_scale(self, mean: float, std: float) -> None:
        """Take mean and deviation on demonstrations.

        Args:
            mean: of raw scores.
            std: of raw scores.
        """
        if hasattr(self, "reward"):
            self.reward.mean, self.reward.std = mean, std

    @property
    def has_initial(self) -> bool:
        """Whether the policy as it was before training can be had again."""
        return self.lm_config.path is not None or self.lm_config.adapter is not None

    @contextmanager
    def initial(self) -> Iterator[LanguageModel]:
        """The policy as it was before training; a copy is kept only where every step needs it."""
        try:
            with self.lm.as_reference() as first:
                yield first
        finally:
            train_all_adapters(self.lm)
            if not (self.policy.kl and self.round_config.kl_reference == "initial"):
                self.lm.drop_reference()

    def knows_start(self) -> bool:
        """Whether packs come with log-probabilities of the policy at the start of the round."""
        c = self.policy
        return c.kl > 0 and c.kl_in == "loss" and self.round_config.kl_reference == "previous"

    @torch.no_grad()
    def divergence(self, packs: Sequence[PolicyPack]) -> float:
        """How far the policy is from the start of the round, in nats a response, by rollouts on all processes.

        Args:
            packs: a batch of rollouts.
        """
        known = self.knows_start()
        total, count = 0.0, 0
        for pack in packs:
            trained, before = pack.target_weight != 0, pack.ref_logp
            if not known:
                moved = pack.to(self.device)
                with self.rounds.previous() as lm:
                    hidden = lm.hidden(moved.ids, moved.positions, moved.cu_seqlens)[moved.index]
                    before = lm.head(hidden, moved.targets, temperature=self.sampling.temperature).logp_S
            assert before is not None
            gap = (before.to(pack.old_logp.device) - pack.old_logp)[trained]
            total += float((gap.exp() - 1 - gap).sum())  # k3: never negative, as an estimate that stops things must be
            text = torch.searchsorted(pack.cu_seqlens.long(), pack.index.cpu(), right=True)
            count += len(text[trained.cpu()].unique())
        totals, counts = zip(*from_all_ranks((total, count)), strict=True)
        return sum(totals) / max(sum(counts), 1)

    # ---- held-out pairs ----

    def held_out_margins(self, pairs: Sequence[HeldOutPair]) -> Tensor:
        """Margins of better over other answers; an answer that is in several pairs is scored once.

        Args:
            pairs: N of them.
        """
        rows = {row.ids.tobytes(): row for pair in pairs for row in (pair.chosen, pair.rejected)}
        place = {ids: i for i, ids in enumerate(rows)}
        place_N2 = [[place[row.ids.tobytes()] for row in (pair.chosen, pair.rejected)] for pair in pairs]
        pack = pack_rows(list(rows.values())).to(self.device)
        if self.reward_config.model == "network":
            score = self.reward(pack.ids, pack.positions, pack.cu_seqlens)
        else:
            with self.initial() if self.has_initial else self.rounds.previous() as first:
                before = answer_logps(first, pack)
            score = answer_logps(self.lm, pack) - before
        score_N2 = score[torch.tensor(place_N2, device=score.device)]
        return score_N2[:, 0] - score_N2[:, 1]

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Accuracy on the first held-out pairs, between two steps."""
        if self._held_out is None:
            if not self.data.pairs_file:
                raise UserError("reward.check_every looks at held-out pairs, and there are none: give data.pairs_file")
            self._held_out = self.data.held_out_pairs()[: self.round_config.probe]
        size, lm = self.data.batch_rows or 1, self.reward.lm
        training = lm.training
        lm.eval()
        found = [self.held_out_margins(self._held_out[i : i + size]) for i in range(0, len(self._held_out), size)]
        lm.train(training)
        return float(watch.accuracy(torch.cat(found)).mean())

    # ---- checkpoints ----

    def _rollouts_left(self) -> bool:
        place = self.place
        return place is not None and place.phase == "policy" and (place.step + 1) % self.policy.updates > 0

    def between_updates(self) -> bool:
        """Whether rollouts wait for a further update."""
        return self._between

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rounds' state with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["irl"] = self.rounds.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the phase that was under way."""
        super().on_load_checkpoint(checkpoint)
        self._between = "round" in checkpoint
        if "irl" in checkpoint:
            self.rounds.load(checkpoint["irl"])
            self.set_scale(self.rounds.state.mean, self.rounds.state.std)
