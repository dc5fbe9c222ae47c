"""TextData: files of plain text in, packed token rows for pretraining out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_reason.data.cache import default_cache_folder, digest, file_digest, open_folder
from lit_reason.data.packed_data import PackedData, Split
from lit_reason.data.reading.records import Quarantine
from lit_reason.data.text.documents import held_out, read_documents
from lit_reason.data.text.text_rows import Layout, TextRow, TextRows
from lit_reason.data.text.text_store import TextStore, write_text_store
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.errors import UserError

FORMAT = 1  # raise when what lies in a store or a trained tokenizer changes


class TextData(PackedData):
    """Reads documents, trains a tokenizer on them if the model has none, and packs their tokens.

    Args:
        train_file: documents: JSONL, JSON, plain .txt (all also .gz, .xz), parquet, a Hugging Face dataset folder or
            hub id.
        val_file: documents for the validation loss.
        test_file: documents for `test`.
        text_field: field of a row that holds the text; a path such as `messages.0.content` reaches into lists.
        holdout: without a `val_file`, this share of the training documents is kept for validation.
        vocab_size: size of the tokenizer that is trained when the model names none.
        max_length: longest row in tokens; must not exceed the model's context.
        layout: `pack` cuts a long document into rows that continue each other; `truncate` keeps the first `max_length`
            tokens of each document, as the low-rank literature does with its padded batches. Nothing is padded.
        batch_tokens: tokens in a micro-batch; rows are packed best-fit, and none sees another.
        batch_rows: rows in a micro-batch instead, whatever their length (then `batch_tokens` is not used).
        token_budget: train on this many tokens: the corpus is read that far, or passed over as often as it takes, and
            the run has the steps that are needed, whatever `trainer.max_steps` and `max_epochs` say. None reads all and
            leaves the length to them, or to the callback `TrainingBudget`, which has the last word.
        seed: seed of the holdout and of the order of rows.
        workers: loading processes; 0 loads in the main process.
        cache_dir: folder of tokenised rows; default `$LIT_REASON_CACHE` or `~/.cache/lit_reason`.
        max_bad_rows: rows without text go to a quarantine file with the reason; more than this many stop the run.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        text_field: str = "text",
        holdout: float = 0.0,
        vocab_size: int = 32_000,
        max_length: int = 256,
        layout: Layout = "pack",
        batch_tokens: int = 16_384,
        batch_rows: int | None = None,
        token_budget: int | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__()
        if not 0 <= holdout < 1:
            raise UserError(f"data.holdout is {holdout}: a share of the documents, from 0 up to but not including 1")
        self.files = {"train": train_file, "val": val_file, "test": test_file}
        self.text_field, self.holdout, self.vocab_size = text_field, holdout, vocab_size
        self.max_length, self.layout = max_length, layout
        self.batch_tokens, self.batch_rows, self.workers = batch_tokens, batch_rows, workers
        self.token_budget, self.seed, self.max_bad_rows = token_budget, seed, max_bad_rows
        self.cache = Path(cache_dir) if cache_dir else default_cache_folder()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.stores: dict[str, TextStore] = {}
        self._digests: dict[str, str] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Tokenise what this stage needs, or open it from the cache.

        Args:
            stage: `fit`, `validate` or `test`.

        Raises:
            UserError: a file is missing, cannot be read, or holds less than one batch.
        """
        if stage == "predict":
            raise UserError("TextData has no prompts to answer: export the model and give TraceData a predict_file")
        super().setup(stage)
        if stage == "fit":
            self._check_size()
            if self.token_budget is not None and self.trainer is not None:
                self.trainer.fit_loop.epoch_loop.max_steps = self.steps()
                self.trainer.fit_loop.max_epochs = -1  # as many passes as it takes

    def trained_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer trained on the training documents, held-out ones left aside; made once and kept."""
        source = {"tokenizer": FORMAT, **self._source("train"), "vocab_size": self.vocab_size}

        def build(folder: Path) -> None:
            rank_zero_info(f"training a tokenizer of {self.vocab_size:,} tokens on {', '.join(self.paths('train'))}")
            texts = (text for _, text in self._documents("train", Quarantine(None, self.max_bad_rows)))
            train_tokenizer(texts, self.vocab_size).save_pretrained(folder)

        return AutoTokenizer.from_pretrained(open_folder(self.cache, digest(source), build))

    def _source(self, split: str) -> dict[str, Any]:
        """All that the documents of a split depend on."""
        for path in self.paths(split):
            if path not in self._digests:
                self._digests[path] = file_digest(path)
        drawn = (split == "val", self.holdout, self.seed) if self._shares_file(split) else None
        return {"files": [self._digests[p] for p in self.paths(split)], "field": self.text_field, "drawn": drawn}

    def _shares_file(self, split: str) -> bool:
        return split != "test" and not self.files["val"] and self.holdout > 0

    def _documents(self, split: str, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
        for name, text in read_documents(self.paths(split), self.text_field, quarantine):
            if not self._shares_file(split) or held_out(text, self.holdout, self.seed) == (split == "val"):
                yield name, text

    def open_store(self, split: Split) -> TextStore:
        """The rows of a split, as `PackedData.open_store`."""
        assert self.tokenizer is not None
        rows = TextRows(self.tokenizer, self.max_length, self.layout)
        budget = self.token_budget if split == "train" else None
        key = digest(
            {
                "text": FORMAT,
                **self._source(split),
                "tokenizer": (rows.backend.to_str(), rows.start, rows.end),
                "rows": (self.max_length, self.layout, budget),
            }
        )
        quarantine = self.cache / f"{key}.quarantine.jsonl"

        def build(folder: Path) -> None:
            with Quarantine(quarantine, self.max_bad_rows) as rejects:
                counted = _Counted(self._documents(split, rejects), rows, budget, split)
                write_text_store(folder, counted.rows(), len(cast(Any, self.tokenizer)), lambda: counted.meta(rejects))
                if not counted.row_count:
                    raise UserError(
                        f"no {split} text is left of {', '.join(self.paths(split))}: {counted.documents} documents, "
                        f"{counted.empty} of them empty. {rejects.summary()}"
                    )

        store = TextStore(open_folder(self.cache, key, build))
        self._tell(split, store, quarantine)
        return store

    def _tell(self, split: str, store: TextStore, quarantine: Path) -> None:
        tokens, bad = int(store.weight_sums.sum()), sum(store.meta["bad_rows"].values())
        if bad > self.max_bad_rows:  # built under a more generous limit
            raise UserError(f"{bad} bad rows, data.max_bad_rows allows {self.max_bad_rows}; they are in {quarantine}")
        rank_zero_info(f"{split}: {store.meta['documents']:,} documents, {tokens:,} tokens ({store.folder})")
        for note in store.meta["notes"]:
            rank_zero_info(f"  {note}")
        if bad and self.trainer:
            rank_zero_info(f"  {bad} rows could not be used: {', '.join(store.meta['bad_rows'])}. See {quarantine}")
            self.keep_quarantine(split, quarantine)

    # ---- length ----

    def _check_size(self) -> None:
        """Refuse a corpus that does not fill the micro-batches of one optimizer step."""
        store, sampler = self.stores["train"], self.train_dataloader().sampler
        rows = f"{self.batch_rows} rows" if self.batch_rows else f"{self.batch_tokens:,} tokens"
        needed = sampler.accumulate * sampler.world
        tokens = int(store.lengths.sum())
        too_small = len(store) < (self.batch_rows or 1) or (not self.batch_rows and tokens < self.batch_tokens)
        if too_small or sampler.bins < needed:
            raise UserError(
                f"data.train_file holds {len(store):,} rows of {tokens:,} tokens, less than one optimizer step of "
                f"{needed} x {rows}: give more text, or lower data.batch_{'rows' if self.batch_rows else 'tokens'}"
            )

    def steps(self) -> int:
        """Optimizer steps in which `token_budget` tokens are trained."""
        assert self.token_budget is not None
        return self.train_dataloader().steps_for(self.token_budget)


class _Counted:
    """One pass over the documents of a split, counting what happens on the way."""

    def __init__(self, documents: Iterator[tuple[str, str]], encode: TextRows, budget: int | None, split: str) -> None:
        self.source, self.encode, self.budget, self.split = documents, encode, budget, split
        self.documents = self.empty = self.row_count = self.tokens = 0

    def rows(self) -> Iterator[TextRow]:
        bar = tqdm(self.encode(self._whole()), desc=f"tokenise {self.split}", unit=" rows", delay=1, leave=False)
        for row in bar:
            self.row_count += 1
            self.tokens += len(row.ids) - 1
            yield row
            if self.budget is not None and self.tokens >= self.budget:
                return

    def _whole(self) -> Iterator[tuple[str, str]]:
        for name, text in self.source:
            self.documents += 1
            self.empty += not text
            if text:
                yield name, text

    def meta(self, rejects: Quarantine) -> dict[str, Any]:
        notes = []
        if self.empty:
            notes.append(f"{self.empty:,} empty documents were passed over")
        if self.encode.cut_tokens:
            notes.append(f"{self.encode.cut_tokens:,} tokens behind data.max_length were left out (layout truncate)")
        if self.budget is not None and self.tokens >= self.budget:
            notes.append("reading stopped at data.token_budget")
        return {
            "rows": self.row_count,
            "documents": self.documents,
            "bad_rows": dict(rejects.counts),
            "notes": notes,
        }
