"""UnlearnData: what is to be forgotten, what is to be kept, and what tells whether it worked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.loader import BinSampler, OrderedLoader
from lit_reason.data.prompts import EvalPrompt
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import TokenRow
from lit_reason.data.unlearning.choices import COMMON, Question, read_questions
from lit_reason.data.unlearning.pairs import PairSampler, RolePack, RoleRows
from lit_reason.data.unlearning.refusals import refusal_for
from lit_reason.data.unlearning.rows import Role, UnlearnRow, check_apart, check_strangers, read_rows
from lit_reason.errors import RowError, UserError

Files = str | list[str] | None

UNLIKE_LENGTHS = 1.5  # members so much longer than nonmembers, or shorter, are told by their length


class UnlearnData(LightningDataModule):
    """Reads both sets, pairs their rows for training, and hands out all that is scored.

    Rows of LUME, TOFU and MUSE are read as they are (`data.unlearning.rows`). Their texts are never logged.

    Args:
        forget: rows to forget.
        retain: rows to keep; as in the benchmarks, of the same kind as those to forget.
        members: documents that the model was trained on, for the privacy attack (`document` or `text`).
        nonmembers: documents like them that it never saw; without both there is no attack score.
        utility: four-choice questions: `common` for the set that comes with the project, a file of your own, or null.
        mode: `plain` joins prompt and answer as they are, as the LUME benchmark does; `chat` goes through the model's
            chat template.
        train_on: `answer` trains what follows the prompt, `text` all of a row. Scores are of answers in any case.
        batch_rows: forget rows in a micro-batch (retain rows where those alone are trained).
        retain_ratio: retain rows that accompany each forget row; they are walked through in turn.
        chunk_rows: deal the forget rows into chunks of this many, unlearnt one after another; null for one chunk.
        chunk_passes: passes over a chunk before the next one; an epoch is as many passes over all rows.
        score_tokens: tokens in a micro-batch of scoring.
        max_length: longest row in tokens. Documents are cut there into several rows, those of the attack cut off.
        seed: seed of the order.
    """

    def __init__(
        self,
        forget: Files = None,
        retain: Files = None,
        members: Files = None,
        nonmembers: Files = None,
        utility: str | None = COMMON,
        mode: Literal["plain", "chat"] = "plain",
        train_on: Literal["answer", "text"] = "answer",
        batch_rows: int = 8,
        retain_ratio: int = 1,
        chunk_rows: int | None = None,
        chunk_passes: int = 1,
        score_tokens: int = 4096,
        max_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits = {"batch_rows": batch_rows, "retain_ratio": retain_ratio, "chunk_passes": chunk_passes}
        for name, given in {**limits, "chunk_rows": chunk_rows or 1, "max_length": max_length}.items():
            if given < 1:
                raise UserError(f"data.{name} is {given}; it must be at least 1")
        if chunk_passes > 1 and chunk_rows is None:
            raise UserError("data.chunk_passes passes over chunks: give data.chunk_rows too")
        self.files = {Role.FORGET: forget, Role.RETAIN: retain, Role.MEMBER: members, Role.NONMEMBER: nonmembers}
        self.utility, self.mode, self.train_on = utility, mode, train_on
        self.batch_rows, self.retain_ratio = batch_rows, retain_ratio
        self.chunk_rows, self.chunk_passes = chunk_rows, chunk_passes
        self.score_tokens, self.max_length, self.seed = score_tokens, max_length, seed
        self.tokenizer: Any = None
        self.rows: list[UnlearnRow] = []
        self.store: RoleRows | None = None  # as they are scored
        self.trained: RoleRows | None = None  # as they are trained; made by `train_dataloader`
        self.choices: dict[str, tuple[str, bool]] = {}  # by name of a token row: its question, and whether it is right
        self.texts: dict[str, UnlearnRow] = {}  # rows to forget and to keep, by id
        # An unlearning loss says which rows an epoch is a pass over, which go with them, and whether it needs refusals.
        self.anchor: tuple[Role, ...] = (Role.FORGET,)
        self.partner: tuple[Role, ...] = (Role.RETAIN,)
        self.refuse = False

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Read and render all rows; every stage needs them.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: a set is missing or empty, they overlap, or a row cannot be used.
        """
        if self.store is not None:
            return
        if self.tokenizer is None:
            assert self.trainer is not None, "set .tokenizer to use the data module without a trainer"
            self.tokenizer = cast(Any, self.trainer.lightning_module).tokenizer
        self.renderer = Renderer(self.tokenizer, RenderConfig(mode=self.mode, train_on="last"))
        self._read()
        rows: list[TokenRow] = []
        roles: list[Role] = []
        for row in self.rows:
            for token_row in self._token_rows(row):
                rows.append(token_row)
                roles.append(row.role)
        for question in read_questions(self.utility) if self.utility else []:
            for token_row in self._choice_rows(question):
                rows.append(token_row)
                roles.append(Role.CHOICE)
        self.store = RoleRows(rows, roles)
        self._compare_lengths(self.store)
        counts = {role.name.lower(): int((self.store.roles == role).sum()) for role in Role}
        rank_zero_info("rows: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))

    def _read(self) -> None:
        for role, needed in ((Role.FORGET, True), (Role.RETAIN, True), (Role.MEMBER, False), (Role.NONMEMBER, False)):
            setting = f"data.{role.name.lower()}" + ("" if needed else "s")
            given = self.files[role]
            if needed and not given:
                what = (
                    "the rows to forget" if role == Role.FORGET else "rows to keep, or there is no telling what is lost"
                )
                raise UserError(f"{setting} is missing: give {what}, --{setting} FILE")
            self.rows += read_rows(given, role, setting) if given else []
        sets = {role: [row for row in self.rows if row.role == role] for role in self.files}
        if bool(sets[Role.MEMBER]) != bool(sets[Role.NONMEMBER]):
            raise UserError("data.members and data.nonmembers belong together: the attack tells one from the other")
        check_apart(sets[Role.FORGET], sets[Role.RETAIN])
        check_strangers(sets[Role.MEMBER], sets[Role.NONMEMBER])
        self.texts = {row.row_id: row for row in self.rows if row.role in (Role.FORGET, Role.RETAIN)}

    def _compare_lengths(self, store: RoleRows) -> None:
        if not self.files[Role.MEMBER]:
            return
        seen, unseen = (float(store.lengths[store.numbers(r)].mean()) for r in (Role.MEMBER, Role.NONMEMBER))
        if max(seen, unseen) > UNLIKE_LENGTHS * min(seen, unseen):
            rank_zero_warn(
                f"data.members have {seen:.0f} tokens on the mean and data.nonmembers {unseen:.0f}: the attack would "
                "tell them by their length. Take documents of one kind"
            )

    def _token_rows(self, row: UnlearnRow) -> list[TokenRow]:
        attack = row.role in (Role.MEMBER, Role.NONMEMBER)
        conversation = row.conversation
        if attack:
            conversation = _with_last(conversation, truncated=True)  # the attack reads the text and no end token
        return self._fit(dataclasses.replace(self._render(conversation, row.row_id), row_id=row.row_id), row)

    def _render(self, conversation: Conversation, name: str) -> TokenRow:
        try:
            return self.renderer.rows(conversation)[-1]
        except RowError as error:
            raise UserError(f"{name}: {str(error).partition(': near')[0]}") from error  # what is near is a row's text

    def _fit(self, found: TokenRow, row: UnlearnRow) -> list[TokenRow]:
        """A token row no longer than `max_length`, or the stretches of a document."""
        limit, size = self.max_length, len(found)
        if size <= limit:
            return [found]
        if row.role in (Role.MEMBER, Role.NONMEMBER):
            return [_part(found, 0, limit, row.row_id)]
        if row.kind != "document":
            raise UserError(f"{row.row_id} has {size} tokens, data.max_length is {limit}")
        starts = range(0, size - 1, limit - 1)
        return [_part(found, s, min(s + limit, size), f"{row.row_id}#{k}") for k, s in enumerate(starts)]

    def _choice_rows(self, question: Question) -> list[TokenRow]:
        found = []
        for k, ending in enumerate(question.endings):
            name = f"{question.name}#{k}"
            said = (Message("user", question.prompt), Message("assistant", ending, trained=True, truncated=True))
            found.append(self._render(Conversation(said, name), name))
            self.choices[name] = (question.name, k == question.right)
        return found

    def _add_refusals(self) -> dict[int, int]:
        """A refusal beside each row to forget, once; number of the one by number of the other."""
        assert self.store is not None
        if not (self.store.roles == Role.REFUSAL).any():
            refusals = []
            for i in self.store.numbers(Role.FORGET):
                row = self.texts[self.store.rows[i].row_id.partition("#")[0]]
                space = " " if self.mode == "plain" else ""
                said = _with_last(row.conversation, content=space + refusal_for(row.row_id))
                refusals.append(dataclasses.replace(self._render(said, row.row_id), row_id=row.row_id))
            old = self.store
            self.store = RoleRows([*old.rows, *refusals], [*old.roles.tolist(), *[Role.REFUSAL] * len(refusals)])
            self.store.reference = old.reference
        pairs = zip(self.store.numbers(Role.FORGET), self.store.numbers(Role.REFUSAL), strict=True)
        return {int(a): int(b) for a, b in pairs}

    @property
    def groups(self) -> list[str]:
        """Names of the scores that the rows have, in the benchmark's order."""
        scored = {row.group for row in self.rows if row.role in (Role.FORGET, Role.RETAIN) and row.kind != "document"}
        return sorted(scored)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn, for generation."""
        return self.renderer.stop_ids

    # ---- loaders ----

    def train_dataloader(self) -> OrderedLoader:
        """Rows to forget with rows to keep, or what else the loss asks for."""
        beside = self._add_refusals() if self.refuse else {}
        assert self.store is not None
        self.trained = self.store.whole() if self.train_on == "text" else self.store
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = PairSampler(
            self.trained,
            self.store.numbers(*self.anchor),
            self.store.numbers(*self.partner),
            beside=beside,
            batch_rows=self.batch_rows,
            ratio=self.retain_ratio,
            chunk_rows=self.chunk_rows if self.anchor == (Role.FORGET,) else None,
            chunk_passes=self.chunk_passes,
            seed=self.seed,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
        )
        return OrderedLoader(self.trained, sampler)

    def _scored(self) -> OrderedLoader:
        """Everything but refusals, in order. Processes share it, unless all must run in step on the same rows."""
        assert self.store is not None
        numbers = np.flatnonzero(self.store.roles != Role.REFUSAL)
        store = RoleRows([self.store.rows[i] for i in numbers], [Role(int(self.store.roles[i])) for i in numbers])
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sharded = getattr(getattr(self.trainer, "lightning_module", None), "device_mesh", None) is not None
        sampler = BinSampler(
            store.lengths,
            store.trained.astype(np.float64),
            batch_tokens=max(self.score_tokens, int(store.lengths.max())),
            shuffle=False,
            rank=0 if sharded else ranks.get("rank", 0),
            world=1 if sharded else ranks.get("num_replicas", 1),
        )
        return OrderedLoader(store, sampler)

    def val_dataloader(self) -> OrderedLoader:
        """All that is scored."""
        return self._scored()

    def test_dataloader(self) -> OrderedLoader:
        """All that is scored."""
        return self._scored()

    def predict_dataloader(self) -> DataLoader:
        """Prompts of both sets, 64 at a time."""
        return DataLoader(self.prompts(), batch_size=64, collate_fn=list)  # type: ignore[arg-type]

    def prompts(self) -> list[EvalPrompt]:
        """What the model is asked: every row of both sets that has a question or a beginning."""
        asked = [row for row in self.texts.values() if row.kind != "document"]
        return [EvalPrompt(self.renderer.prompt(r.conversation), r.row_id, r.prompt, r.answer) for r in asked]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Packs move; prompts stay as they are."""
        return batch.to(device, non_blocking=True) if isinstance(batch, RolePack) else batch


def _with_last(conversation: Conversation, **changes: Any) -> Conversation:
    *before, last = conversation.messages
    return dataclasses.replace(conversation, messages=(*before, dataclasses.replace(last, **changes)))


def _part(row: TokenRow, start: int, stop: int, name: str) -> TokenRow:
    """A stretch of a row; its first token is there to be seen and not trained."""
    weight = row.weight[start:stop].copy()
    weight[0] = 0.0
    return TokenRow(row.ids[start:stop], weight, row.segment[start:stop], row.decile[start:stop], name)


def packs_of(store: RoleRows, numbers: Sequence[int], tokens: int) -> Iterator[tuple[list[int], RolePack]]:
    """Packs of some rows, for passes outside a loader.

    Args:
        store: the rows.
        numbers: which of them.
        tokens: most tokens in a pack that holds more than one row.

    Yields:
        The numbers of a pack's rows in its own order, and the pack.
    """
    chosen: list[int] = []
    for i in [*sorted(numbers, key=lambda i: store.roles[i]), None]:
        full = chosen and (i is None or store.lengths[chosen].sum() + store.lengths[i] > tokens)
        if full:
            yield chosen, store.pack(chosen, *store.totals(chosen))
            chosen = []
        if i is not None:
            chosen.append(int(i))
