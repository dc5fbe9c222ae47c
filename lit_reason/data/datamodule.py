"""TraceData: files of conversations in, packed token rows out."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from tqdm import tqdm

from lit_reason.data.cache import TokenStore, default_cache_folder, digest, file_digest, open_store
from lit_reason.data.condensation.answers import final_answer
from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.conversation import Conversation
from lit_reason.data.packed_data import PackedData, Split
from lit_reason.data.prompts import EvalPrompt
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.reading.records import Quarantine, read_records
from lit_reason.data.rendering.contract import check_contract
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import TokenRow
from lit_reason.errors import RowError, UserError

CONTRACT_ROWS = 32  # rows on which the template contract is checked at fit start


class TraceData(PackedData):
    """Reads conversations, condenses their traces, renders them with the model's chat template and packs them.

    Args:
        train_file: training rows: JSONL, JSON, parquet (also .gz, .xz), a Hugging Face dataset folder or hub id.
        val_file: rows for validation loss and verified generation.
        test_file: rows for `test`.
        predict_file: prompts for `predict`; default: the validation rows.
        format: row format; `auto` looks at each row's keys.
        holdout: without a `val_file`, this many rows of `train_file` become the validation rows. The draw depends
            on the seed and the first user turn alone, so equal questions stay on one side.
        condense: how reasoning traces are shortened before training.
        condense_val: the same for validation and test rows; default: as `condense`.
        render: chat template mode, trained turns, loss weights by segment.
        max_length: longest row in tokens; must not exceed the model's context.
        over_length: rows longer than that: `drop` them (counted), condense them just enough to `fit`, or `raise`.
        batch_tokens: tokens in a micro-batch; rows are packed best-fit and never split.
        batch_rows: rows in a micro-batch instead, whatever their length (then `batch_tokens` is not used).
        seed: seed of the holdout and of the order of rows.
        workers: loading processes; 0 loads in the main process.
        cache_dir: folder of tokenised rows; default `$LIT_REASON_CACHE` or `~/.cache/lit_reason`.
        max_bad_rows: unusable rows go to a quarantine file with the reason; more than this many stop the run.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        format: str = "auto",
        holdout: int = 0,
        condense: CondenseConfig = CondenseConfig(),  # noqa: B008 (frozen)
        condense_val: CondenseConfig | None = None,
        render: RenderConfig = RenderConfig(),  # noqa: B008 (frozen)
        max_length: int = 2048,
        over_length: Literal["drop", "fit", "raise"] = "drop",
        batch_tokens: int = 4096,
        batch_rows: int | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__()
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.format, self.holdout, self.seed = format, holdout, seed
        self.condense, self.condense_val, self.render = condense, condense_val or condense, render
        self.max_length, self.over_length = max_length, over_length
        self.batch_tokens, self.batch_rows, self.workers = batch_tokens, batch_rows, workers
        self.cache = Path(cache_dir) if cache_dir else default_cache_folder()
        self.max_bad_rows = max_bad_rows
        self.tokenizer: Any = None
        self.stores: dict[str, TokenStore] = {}
        self._held_out_ids: frozenset[str] | None = None
        self._told: set[str] = set()

    # ---- set-up ----

    @cached_property
    def renderer(self) -> Renderer:
        """What turns conversations into rows, by the tokenizer."""
        return Renderer(self.tokenizer, self.render)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn, for generation."""
        return self.renderer.stop_ids

    def open_store(self, split: Split) -> TokenStore:
        """The rows of a split, as `PackedData.open_store`."""
        condense = self.condense if split == "train" else self.condense_val
        paths = self.paths(split)
        held_out = self._held_out() if split != "test" and not self.files["val"] else frozenset()
        key = digest(
            {
                "files": [(path, file_digest(path)) for path in paths],
                "format": self.format,
                "condense": dataclasses.asdict(condense),
                "models": [file_digest(m) for m in (condense.scorer, condense.teacher) if m],
                "render": self.renderer.fingerprint(),
                "max_length": self.max_length,
                "over_length": self.over_length,
                "held_out": (split, sorted(held_out)),
            }
        )
        quarantine = self.cache / f"{key}.quarantine.jsonl"

        def build() -> tuple[Iterator[TokenRow], Callable[[], dict[str, Any]]]:
            rejects = Quarantine(quarantine, self.max_bad_rows)
            keep = (lambda row_id: row_id in held_out) if split == "val" else (lambda row_id: row_id not in held_out)
            builder = RowBuilder(self, condense, rejects)
            return builder.rows(paths, keep if held_out else lambda row_id: True, split), builder.meta

        store = open_store(self.cache, key, build)
        bad = sum(store.meta["bad_rows"].values())
        if bad > self.max_bad_rows:  # built under a more generous limit
            raise UserError(f"{bad} bad rows, data.max_bad_rows allows {self.max_bad_rows}; they are in {quarantine}")
        self._tell(split, store, quarantine)
        return store

    def _held_out(self) -> frozenset[str]:
        """Row ids of the `holdout` rows drawn from the training file."""
        if self._held_out_ids is None:
            self._held_out_ids = self._draw_held_out() if self.holdout > 0 and self.files["train"] else frozenset()
        return self._held_out_ids

    def _draw_held_out(self) -> frozenset[str]:
        """One pass in memory of the drawn rows: the smallest keys stay, each with all rows of its question."""
        rejects = Quarantine(None, self.max_bad_rows)
        keys: list[str] = []  # in order, at most `holdout` of them
        groups: dict[str, list[str]] = {}
        for row_id, record in _records(self.paths("train"), rejects):
            try:
                first = next(m for m in self._conversation(record, row_id).messages if m.role != "system")
            except RowError:
                continue  # counted when the rows are built
            key = hashlib.sha256(f"{self.seed}\0{first.content}".encode("utf-8", "replace")).hexdigest()
            if key not in groups and (len(keys) < self.holdout or key < keys[-1]):
                bisect.insort(keys, key)
                groups[key] = []
                if len(keys) > self.holdout:
                    del groups[keys.pop()]
            if key in groups:
                groups[key].append(row_id)
        drawn: list[str] = []
        for key in keys:
            if len(drawn) >= self.holdout:
                break
            drawn += groups[key]
        return frozenset(drawn)

    def _conversation(self, record: dict, row_id: str) -> Conversation:
        return to_conversation(record, row_id, format=self.format, train_on=self.render.train_on)

    def _tell(self, split: str, store: TokenStore, quarantine: Path) -> None:
        bad = store.meta["bad_rows"]
        rank_zero_info(f"{split}: {len(store)} rows, {int(store.lengths.sum()):,} tokens ({store.folder})")
        ledger = store.meta["condensation"]
        if condensed := ledger["rows"].get("condensed"):
            saved = ledger["predicted_time_saved"]
            rank_zero_info(f"  condensed {condensed} of {sum(ledger['rows'].values())} rows: {saved:.0%} fewer tokens")
        for note in store.meta["notes"]:
            if note not in self._told:
                rank_zero_info(f"  {note}")
        self._told.update(store.meta["notes"])
        if bad:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(bad).most_common(3))
            rank_zero_info(f"{split}: {sum(bad.values())} rows could not be used: {reasons}. See {quarantine}")
            if self.trainer:
                self.keep_quarantine(split, quarantine)

    def predict_dataloader(self) -> DataLoader:
        """Prompts, 64 at a time.

        Raises:
            UserError: there are none.
        """
        if not self.files["predict"] and not self.has_val:
            raise UserError(
                "nothing to answer: give data.predict_file, or data.val_file, or data.holdout with train_file"
            )
        return DataLoader(self.eval_prompts(), batch_size=64, collate_fn=list)  # type: ignore[arg-type]

    def eval_prompts(self, limit: int | None = None) -> list[EvalPrompt]:
        """Held-out problems as prompts, each with its reference answer.

        Args:
            limit: at most this many, from the front; None takes all.

        Returns:
            Prompts from `predict_file`, else from the validation rows.
        """
        split = "predict" if self.files["predict"] else "val"
        held_out = self._held_out() if split == "val" and not self.files["val"] else None
        prompts: list[EvalPrompt] = []
        rejects = Quarantine(None, self.max_bad_rows)
        for row_id, record in _records(self.paths(split), rejects):
            if held_out is not None and row_id not in held_out:
                continue
            if limit is not None and len(prompts) == limit:
                break
            try:
                conversation = to_conversation(record, row_id, format=self.format, need_assistant=False)
                prompts.append(_eval_prompt(conversation, self.renderer))
            except RowError as error:
                rejects.add(row_id, str(error), record)
        return prompts


class RowBuilder:
    """One pass from records to token rows, counting what happens on the way."""

    def __init__(self, data: TraceData, condense: CondenseConfig, quarantine: Quarantine) -> None:
        self.data, self.quarantine = data, quarantine
        tokenizer = data.tokenizer
        self.condenser = Condenser(condense, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        self.dropped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.count = 0

    def rows(self, paths: list[str], keep: Callable[[str], bool], split: str) -> Iterator[TokenRow]:
        """Token rows of the records that `keep` wants."""
        try:
            checked = False
            first: list[Conversation] = []
            records = _records(paths, self.quarantine)
            for row_id, record in tqdm(records, desc=f"tokenise {split}", unit=" rows", delay=1, leave=False):
                if not keep(row_id):
                    continue
                try:
                    conversation = self._conversation(record, row_id)
                    if conversation is None:
                        continue
                    first.append(conversation)
                    for row in self._token_rows(conversation):
                        self.count += 1
                        yield row
                except RowError as error:
                    self.quarantine.add(row_id, str(error), record)
                if not checked and len(first) == CONTRACT_ROWS:
                    checked = self._check(first)
            if first and not checked:
                self._check(first)
            if not self.count:
                raise UserError(
                    f"no {split} row is left of {', '.join(paths)}: {sum(self.dropped.values())} too long "
                    f"(data.max_length is {self.data.max_length}), "
                    f"{sum(n for o, n in self.condenser.ledger.rows.items() if o.startswith('dropped'))} dropped by "
                    f"data.condense, {self.quarantine.total} unusable. {self.quarantine.summary()}"
                )
        finally:
            self.quarantine.close()

    def meta(self) -> dict[str, Any]:
        """Counts, ledger and notes of the pass."""
        return {
            "rows": self.count,
            "bad_rows": dict(self.quarantine.counts),
            "dropped": dict(self.dropped),
            "condensation": self.condenser.ledger.to_dict(),
            "notes": self.notes + [f"{count} rows {reason}" for reason, count in self.dropped.items()],
        }

    def _conversation(self, record: dict, row_id: str) -> Conversation | None:
        conversation = self.condenser(self.data._conversation(record, row_id))
        if conversation is None or self.data.over_length != "fit":
            return conversation
        if self._length(conversation) <= self.data.max_length:
            return conversation
        fitted = self.condenser.fit(conversation, self.data.max_length, self._length)
        self.dropped["condensed further to fit max_length" if fitted else "too long even when condensed"] += 1
        return fitted

    def _length(self, conversation: Conversation) -> int:
        return max(len(row) for row in self.data.renderer.rows(conversation))

    def _token_rows(self, conversation: Conversation) -> Iterator[TokenRow]:
        limit = self.data.max_length
        for row in self.data.renderer.rows(conversation):
            if len(row) <= limit:
                yield row
            elif self.data.over_length == "raise":
                raise UserError(f"{row.row_id} has {len(row)} tokens, data.max_length is {limit}")
            else:
                self.dropped[f"dropped: longer than {limit} tokens"] += 1

    def _check(self, conversations: list[Conversation]) -> bool:
        self.notes += check_contract(self.data.renderer, conversations).notes
        conversations.clear()
        return True


def _records(paths: list[str], quarantine: Quarantine) -> Iterator[tuple[str, dict]]:
    for path in paths:
        yield from read_records(path, quarantine)


def _eval_prompt(conversation: Conversation, renderer: Renderer) -> EvalPrompt:
    turns = conversation.messages
    reply = turns[-1].content if turns[-1].role == "assistant" else ""
    question = next((m.content for m in reversed(turns) if m.role == "user"), "")
    return EvalPrompt(
        ids=renderer.prompt(conversation),
        row_id=conversation.row_id,
        text=question,
        answer=conversation.answer or final_answer(reply),
        metadata=conversation.metadata,
    )
