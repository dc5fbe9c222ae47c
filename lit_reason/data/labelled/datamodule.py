"""LabelledData: labelled texts in, packed token rows with a class each out, and prompts to steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_reason.core.run_folder import run_folder
from lit_reason.data.cache import digest
from lit_reason.data.labelled.texts import LabelledText, Part, read_history, split_history
from lit_reason.data.loader import Bin, BinSampler, OrderedLoader
from lit_reason.data.packing import Pack, pack_rows
from lit_reason.data.prompts import EvalPrompt
from lit_reason.data.reading.records import Quarantine, read_every_record
from lit_reason.data.text.documents import text_at
from lit_reason.data.token_row import DECILE_NONE, Segment, TokenRow
from lit_reason.errors import RowError, UserError

OPENINGS = ("I think that", "Once upon a time", "The most important thing is", "Yesterday, someone told me that",
            "In my opinion,", "There is a reason why", "When I was young,", "The best way to")  # fmt: skip


@dataclass(frozen=True)
class LabelledPack:
    """Texts of one pass with their classes.

    Attributes:
        pack: the texts end to end; every token but a text's first is predicted.
        labels: class of each text, -1 for a stand-in that counts nowhere.
        numbers: of the texts in their history.
    """

    pack: Pack
    labels: torch.Tensor
    numbers: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledPack:
        """The same with the pack's tensors on `device`; classes and numbers are read on the CPU."""
        return replace(self, pack=self.pack.to(device, non_blocking))


class TextPacks(Dataset):
    """Bins of text numbers in, packs out.

    Args:
        rows: the texts in tokens.
        texts: the same texts.
        classes: names, in the order of their numbers.
    """

    def __init__(self, rows: Sequence[TokenRow], texts: Sequence[LabelledText], classes: Sequence[str]) -> None:
        self.rows, self.texts = rows, texts
        self.labels = [list(classes).index(text.label) for text in texts]

    def __getitem__(self, chosen: Bin) -> LabelledPack:
        rows = chosen.rows or (0,)  # a rank without texts still takes part in every collective
        labels = [self.labels[i] if chosen.rows else -1 for i in rows]
        pack = pack_rows([self.rows[i] for i in rows], chosen.norm, trained=bool(chosen.rows))
        return LabelledPack(pack, torch.tensor(labels), torch.tensor([self.texts[i].number for i in rows]))


class LabelledData(LightningDataModule):
    """Reads labelled texts, keeps some back for validation and for the judge, and has prompts to steer.

    Args:
        history: labelled texts: JSONL, JSON (also .gz, .xz), parquet, a Hugging Face dataset folder or hub id.
        text_field: field of a row that holds the text; a path such as `messages.0.content` reaches into lists.
        label_field: field that holds the label.
        pair_field: field that names the pair a text belongs to, for contrast pairs (`direction.method: caa`).
        prompts: what `test` and `predict` continue: a file of rows with `prompt` and, if wished, a `mix` of their own,
            or the prompts themselves; default: some neutral openings.
        chat: put each prompt to the model as a user's turn.
        holdout: share of the texts kept for validation.
        judge_share: share of the texts that the judge of `test` learns from; directions never see them.
        batch_rows: texts in a micro-batch.
        max_length: longer texts are cut to so many tokens; how many are is logged.
        seed: of the split into parts. The order of the texts follows the run's seed.
        max_bad_rows: rows without text or label go to a quarantine file with the reason; more than this stop the run.

    Attributes:
        parts: the texts by what they are for, once they are read.
        classes: names of the labels, in the order of their numbers.
        provenance: what tells history and split from others: classes, hash of the texts, settings of the split.
    """

    def __init__(
        self,
        history: str | list[str] | None = None,
        text_field: str = "text",
        label_field: str = "label",
        pair_field: str | None = None,
        prompts: str | list[str] | None = None,
        chat: bool = False,
        holdout: float = 0.2,
        judge_share: float = 0.3,
        batch_rows: int = 8,
        max_length: int = 512,
        seed: int = 0,
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__()
        if holdout < 0 or judge_share < 0 or holdout + judge_share >= 1:
            raise UserError(
                f"data.holdout {holdout} and data.judge_share {judge_share} are shares of the texts; together below 1"
            )
        for name, given, least in (("batch_rows", batch_rows, 1), ("max_length", max_length, 2)):
            if given < least:
                raise UserError(f"data.{name} is {given}; it must be at least {least}")
        self.paths = [history] if isinstance(history, str) else list(history or ())
        self.text_field, self.label_field, self.pair_field = text_field, label_field, pair_field
        self.prompts, self.chat = prompts, chat
        self.holdout, self.judge_share = holdout, judge_share
        self.batch_rows, self.max_length, self.max_bad_rows = batch_rows, max_length, max_bad_rows
        self.seed = seed
        self.tokenizer: Any = None
        self.parts: dict[Part, list[LabelledText]] = {}
        self.classes: list[str] = []
        self.provenance: dict[str, Any] = {}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a continuation."""
        return (self.tokenizer.eos_token_id,) if self.tokenizer.eos_token_id is not None else ()

    def setup(self, stage: str) -> None:
        """Read the history, unless only prompts are wanted.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: there is no history, or it has one label only.
        """
        if self.tokenizer is None:
            assert self.trainer is not None, "set .tokenizer to use the data module without a trainer"
            self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]
        if stage == "predict" or self.parts:
            return
        if not self.paths:
            raise UserError("data.history is missing: give the labelled texts, --data.history FILE")
        folder = run_folder(self.trainer) if self.trainer else None
        rejects = folder / "quarantine-history.jsonl" if folder and self.trainer.is_global_zero else None  # type: ignore[union-attr]
        with Quarantine(rejects, self.max_bad_rows) as quarantine:
            history = read_history(self.paths, self.text_field, self.label_field, self.pair_field, quarantine)
        if quarantine.total:
            rank_zero_info(quarantine.summary())
        self.parts = split_history(history, self.holdout, self.judge_share, self.seed)
        self.classes = sorted({item.label for item in history})
        self.provenance = {
            "classes": self.classes,
            "data_hash": digest({"texts": [(item.text, item.label) for item in history]}),
            "split": {"holdout": self.holdout, "judge_share": self.judge_share, "seed": self.seed},
        }
        counts = ", ".join(f"{len(items)} {part}" for part, items in self.parts.items())
        rank_zero_info(f"history: {len(history)} texts of {len(self.classes)} classes ({counts})")

    @property
    def pair_of(self) -> dict[int, str]:
        """Names of pairs by text number."""
        return {item.number: item.pair for item in self.parts["train"] if item.pair is not None}

    def rows(self, part: Part) -> list[TokenRow]:
        """Texts in tokens, as the tokenizer makes them of a text of its own; says how many were cut.

        Args:
            part: of the history.
        """
        texts = self.parts[part]
        encoded = [self.tokenizer(item.text).input_ids for item in texts]
        if cut := sum(len(ids) > self.max_length for ids in encoded):
            rank_zero_info(f"data.max_length {self.max_length} cuts {cut} of {len(texts)} texts of {part}")
        return [self._row(item.row_id, ids[: self.max_length]) for item, ids in zip(texts, encoded, strict=True)]

    @staticmethod
    def _row(row_id: str, tokens: list[int]) -> TokenRow:
        ids = np.asarray(tokens, dtype=np.int32)
        weight = np.ones(len(ids), dtype=np.float32)
        weight[:1] = 0
        segment = np.full(len(ids), Segment.TEXT, dtype=np.uint8)
        return TokenRow(ids, weight, segment, np.full(len(ids), DECILE_NONE, dtype=np.int8), row_id)

    def _loader(self, part: Part, *, shuffle: bool) -> OrderedLoader:
        rows = self.rows(part)
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = BinSampler(
            np.array([len(row) for row in rows]),
            np.array([float(row.weight.sum()) for row in rows]),
            batch_tokens=None,
            batch_rows=self.batch_rows,
            shuffle=shuffle,
            seed=torch.initial_seed(),  # processes of a run share it
            accumulate=self.trainer.accumulate_grad_batches if shuffle and self.trainer else 1,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
        )
        return OrderedLoader(TextPacks(rows, self.parts[part], self.classes), sampler)

    def train_dataloader(self) -> OrderedLoader:
        """Texts that directions are found in."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> OrderedLoader | list[Any]:
        """Texts that the probe has not seen."""
        return self._loader("val", shuffle=False) if self.parts["val"] else []

    def test_dataloader(self) -> DataLoader:
        """All prompts at once, on every process: where weights are in shards, all must generate the same."""
        prompts = self.eval_prompts()
        return DataLoader(prompts, batch_size=len(prompts), collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Packs move; prompts stay as they are."""
        return batch.to(device, non_blocking=True) if isinstance(batch, LabelledPack) else batch

    def predict_dataloader(self) -> DataLoader:
        """Prompts, 64 at a time."""
        return DataLoader(self.eval_prompts(), batch_size=64, collate_fn=list)  # type: ignore[arg-type]

    def eval_prompts(self, limit: int | None = None) -> list[EvalPrompt]:
        """The prompts in tokens; a row's other fields, its `mix` among them, are their metadata.

        Args:
            limit: at most this many, from the front.

        Raises:
            UserError: a row of the file has no prompt.
        """
        found = []
        for row_id, record in self._prompt_records():
            try:
                text = text_at(record, "prompt")
            except RowError as error:
                raise UserError(f"data.prompts: {row_id}: {error}") from None
            rest = {name: value for name, value in record.items() if name != "prompt"}
            found.append(EvalPrompt(self._prompt_ids(text), row_id, text, metadata=rest))
        if not found:
            raise UserError(f"data.prompts: {self.prompts} holds no prompt")
        return found[:limit]

    def _prompt_records(self) -> list[tuple[str, dict[str, Any]]]:
        if isinstance(self.prompts, str):
            return list(read_every_record(self.prompts))
        texts = OPENINGS if self.prompts is None else self.prompts
        return [(f"prompt:{i}", {"prompt": text}) for i, text in enumerate(texts)]

    def _prompt_ids(self, text: str) -> list[int]:
        if not self.chat:
            return list(self.tokenizer(text).input_ids)
        turn = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
