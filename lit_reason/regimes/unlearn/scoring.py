"""Scoring a model on both sets: quickly, token by token, while it trains, and by generation as the benchmark does."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_reason.core.config import OptimConfig
from lit_reason.core.regime import Regime
from lit_reason.core.run_folder import run_folder
from lit_reason.data.prompts import EvalPrompt
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.data.token_row import Segment
from lit_reason.data.unlearning.datamodule import UnlearnData, packs_of
from lit_reason.data.unlearning.pairs import RolePack
from lit_reason.data.unlearning.rows import Role, UnlearnRow
from lit_reason.errors import UserError
from lit_reason.losses.preference import sequence_sums
from lit_reason.metrics.lume import UnlearningScores
from lit_reason.metrics.mmlu import harness, mmlu_accuracy
from lit_reason.metrics.repetition import tail_repeats
from lit_reason.metrics.unlearning import (
    ChoiceAccuracy,
    ExactAnswer,
    LossAttack,
    RegurgitationROUGE,
    RowMeans,
    is_exact,
    rouge_l_recall,
    rouge_scorer,
)
from lit_reason.models.config import ModelConfig
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import Completion, sample

SETS = ("forget", "retain")


class Scorer(nn.Module):
    """Gathers what one pass over the scored rows found, over all processes.

    Args:
        data: the rows.
    """

    def __init__(self, data: UnlearnData) -> None:
        super().__init__()
        self.data = data
        self.token_scores = RowMeans(data.groups)
        self.rouge, self.exact = RegurgitationROUGE(data.groups), ExactAnswer(data.groups)
        self.losses, self.broken = RowMeans(SETS), RowMeans(SETS)
        self.attack, self.choices = LossAttack(), ChoiceAccuracy()
        self.generated = False

    def add_pack(self, pack: RolePack, logp_S: torch.Tensor, hit_S: torch.Tensor) -> None:
        """Rows as the model scores them token by token.

        An answer counts as known when every token of it, the end included, is the likeliest: then greedy generation
        writes exactly it. Of a continuation the share of such tokens counts, which only stands in for ROUGE.

        Args:
            pack: the rows.
            logp_S: log-probability of each trained token.
            hit_S: whether it was the likeliest.
        """
        count = len(pack.roles)
        ones, hits = torch.ones_like(logp_S), hit_S.to(logp_S.dtype)
        tokens = sequence_sums(ones, pack.sequence, count)
        losses = (sequence_sums(-logp_S, pack.sequence, count) / tokens.clamp(min=1)).tolist()
        known = (sequence_sums(hits, pack.sequence, count) == tokens).tolist()
        inside = (pack.target_segment != Segment.END).to(logp_S.dtype)
        shares = sequence_sums(hits * inside, pack.sequence, count) / sequence_sums(inside, pack.sequence, count)
        for i in (i for i, there in enumerate(pack.counts.tolist()) if there):
            self._add_row(pack.roles[i], pack.row_ids[i], losses[i], known[i], float(shares[i].nan_to_num(0.0)))

    def _add_row(self, role: Role, row_id: str, loss: float, known: bool, share: float) -> None:
        if role in (Role.MEMBER, Role.NONMEMBER):
            self.attack.update([row_id], [loss], role == Role.MEMBER)
        elif role == Role.CHOICE:
            question, right = self.data.choices[row_id]
            self.choices.update([row_id], [question], torch.tensor([-loss]), [right])
        elif role != Role.REFUSAL:
            self.losses.update([row_id], [role.name.lower()], [loss])
            row = self.data.texts.get(row_id)  # None for a stretch of a document
            if row is not None and row.kind != "document":
                value = share if row.kind == "regurgitation" else float(known)
                self.token_scores.update([row_id], [row.group], [value])

    def add_texts(self, prompts: Sequence[EvalPrompt], completions: Sequence[Completion], texts: Sequence[str]) -> None:
        """Rows as the model writes them.

        Args:
            prompts: what it was asked.
            completions: its answers, in order.
            texts: the answers decoded without special tokens.
        """
        self.generated = True
        for prompt, completion, text in zip(prompts, completions, texts, strict=True):
            row = self.data.texts[prompt.row_id]
            metric = self.rouge if row.kind == "regurgitation" else self.exact
            metric.update([row.row_id], [row.group], [text], [row.answer])
            ids = completion.ids[:-1] if completion.closed_eos else completion.ids
            self.broken.update([row.row_id], [row.role.name.lower()], [float(not text.strip() or tail_repeats(ids))])

    def scores(self, mmlu: float | None = None) -> UnlearningScores:
        """What was found; all processes must ask together.

        Args:
            mmlu: accuracy on MMLU, which replaces that of the small set.
        """
        with warnings.catch_warnings():  # a process without rows of a kind takes part in the exchange all the same
            warnings.filterwarnings("ignore", message=".*`compute`` method of metric .* was called before.*")
            return self._scores(mmlu)

    def _scores(self, mmlu: float | None) -> UnlearningScores:
        metrics = (self.rouge, self.exact) if self.generated else (self.token_scores,)
        written = {name: value for metric in metrics for name, value in metric.compute().items()}
        accuracy = self.choices.compute().get("accuracy") if self.data.choices else None
        attack = self.attack.compute().get("auc") if self.data.files[Role.MEMBER] else None
        questions = len({question for question, _ in self.data.choices.values()})
        return UnlearningScores(
            {name: written[name] for name in self.data.groups if name in written},
            attack,
            accuracy if mmlu is None else mmlu,
            "MMLU" if mmlu is not None else f"{questions} questions, not MMLU" if questions else "",
            self.broken.compute() if self.generated else {},
            self.generated,
        )

    def figures(self) -> dict[str, float]:
        """Mean loss of the rows of each set."""
        return {f"{name}_loss": loss for name, loss in self.losses.compute().items()}


class ScoredRegime(Regime):
    """Validates by passes without generation, tests as the benchmark does, and leaves `unlearning.json`.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how answers are generated.
        score_every: validations between two that generate too; 0 generates in `test` alone.
        mmlu: measure utility in `test` by MMLU, through lm-eval (extra `mmlu`; it downloads the questions).
    """

    def __init__(
        self, lm: ModelConfig, optim: OptimConfig, sampling: SamplingConfig, score_every: int, mmlu: bool
    ) -> None:
        super().__init__(lm, optim, sampling)
        self.score_every, self.mmlu = score_every, mmlu
        self.scorer: Scorer | None = None
        self._validations = 0

    def setup(self, stage: str) -> None:
        """Find out before a long pass, not after it, that the packages that score are not there.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: rouge-score or lm-eval is asked for and not installed.
        """
        writes = stage in ("test", "predict") or self.score_every
        if writes and any(name.endswith("_regurgitation") for name in self._data.groups):
            rouge_scorer()
        if stage == "test" and self.mmlu:
            harness()

    # ---- passes ----

    def validation_step(self, batch: RolePack, batch_idx: int) -> None:  # type: ignore[override]
        """Score rows token by token."""
        self._add(self._scorer(), batch)

    def test_step(self, batch: RolePack, batch_idx: int) -> None:  # type: ignore[override]
        """Score rows token by token; the documents of the attack and the utility set need no more."""
        self._add(self._scorer(), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures; with answers every `score_every` validations.

        Raises:
            UserError: the model's losses are no numbers any more.
        """
        scorer = self._scorer()
        self._check_finite(scorer)
        if not self.trainer.sanity_checking:
            self._validations += 1
            if self.score_every and self._validations % self.score_every == 0:
                self._generate(scorer)
        self._log(scorer.scores(), scorer.figures(), "val")
        self.scorer = None

    def on_test_start(self) -> None:
        """Leave the table to `UnlearningScores`, which says more than the trainer's."""
        self.trainer.test_loop.verbose = False

    def on_test_epoch_end(self) -> None:
        """Generate, print the table, and write `unlearning.json` into the run folder.

        Raises:
            UserError: the model's losses are no numbers.
        """
        scorer = self._scorer()
        self._check_finite(scorer)
        self._generate(scorer)
        accuracy = mmlu_accuracy(self.lm.hf, self.tokenizer) if self.mmlu else None
        found, losses = scorer.scores(accuracy), scorer.figures()
        self._log(found, losses, "test")
        folder = run_folder(self.trainer)  # asks all processes
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with complete_or_absent(folder / "unlearning.json") as unfinished:
                unfinished.write_text(json.dumps(losses | found.figures(), indent=2) + "\n", encoding="utf-8")
            print(f"{found.table()}\nscores  {folder / 'unlearning.json'}")
        self.scorer = None

    def predict_step(self, batch: list[EvalPrompt], batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts: each record also says which score it counts towards, and with how much."""
        found = super().predict_step(batch, batch_idx)
        for record in found:
            row: UnlearnRow = self._data.texts[record["row_id"]]
            of = rouge_l_recall if row.kind == "regurgitation" else is_exact
            record |= {"group": row.group, "score": float(of(record["completion"], row.answer))}
        return found

    @torch.no_grad()
    def rescore(
        self, *, generate: bool = False, numbers: Sequence[int] | None = None
    ) -> tuple[UnlearningScores, dict[str, float]]:
        """Score the present weights outside of the trainer's own loops. Every process scores all rows.

        Args:
            generate: by generated answers; otherwise token by token.
            numbers: of the rows in `data.store`; None takes all that a test scores.

        Returns:
            The scores, and the mean loss of each set.
        """
        scorer, training, store = Scorer(self._data).to(self.device), self.lm.training, self._data.store
        chosen = np.flatnonzero(store.roles != Role.REFUSAL).tolist() if numbers is None else numbers
        self.lm.eval()
        try:
            with self._arithmetic():
                for _, pack in packs_of(store, chosen, self._data.score_tokens):
                    self._add(scorer, pack.to(self.device))
            if generate:
                self._generate(scorer)
        finally:
            self.lm.train(training)
        return scorer.scores(), scorer.figures()

    def _scorer(self) -> Scorer:
        if self.scorer is None:
            self.scorer = Scorer(self._data).to(self.device)
        return self.scorer

    @staticmethod
    def _check_finite(scorer: Scorer) -> None:
        for name, loss in scorer.figures().items():
            if not math.isfinite(loss):
                raise UserError(
                    f"{name} is NaN or infinite: the weights are broken, and would pass for a model that has forgotten "
                    "everything. Go back to an earlier checkpoint and lower optim.lr, or take a loss with a bound"
                )

    def _add(self, scorer: Scorer, pack: RolePack) -> None:
        out = self.score(pack)
        scorer.add_pack(pack, out.logp_S, out.hit_S)

    def _generate(self, scorer: Scorer) -> None:
        prompts: list[EvalPrompt] = self._data.prompts()
        if self.device_mesh is None:  # otherwise all processes run in step, on the same prompts
            prompts = prompts[self.trainer.global_rank :: self.trainer.world_size]
        with self._arithmetic():
            asked = [prompt.ids for prompt in prompts]
            written = sample(self.lm, self.tokenizer, asked, self.sampling, stop_ids=self._data.stop_ids)
        texts = [str(self.tokenizer.decode(c.ids, skip_special_tokens=True)) for c in written]
        scorer.add_texts(prompts, written, texts)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with self.trainer.precision_plugin.forward_context():  # as in training, autocast included
            yield

    def _log(self, found: UnlearningScores, losses: dict[str, float], prefix: str) -> None:
        for name, value in (losses | found.figures()).items():
            # Equal on all processes already; sync_dist only keeps Lightning from warning about it.
            self.log(f"{prefix}/{name}", value, batch_size=1, sync_dist=self.trainer.world_size > 1)

    # ---- state ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many validations there were."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["validations"] = self._validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting validations."""
        super().on_load_checkpoint(checkpoint)
        self._validations = checkpoint.get("validations", 0)
