"""A tokenizer from the training text itself: byte-level BPE, so that every text can be written and read back."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_reason.errors import UserError

BORDER = "<|endoftext|>"  # opens and closes every document
SMALLEST = 257  # the 256 bytes and the border
TRAINED_ON_CHARS = 100_000_000  # of the text's beginning; merges hardly change after that

# Words with the blank before them, digits in threes, runs of punctuation, white space: as in GPT-4's tokenizer, but
# without its case for English contractions.
PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; equal texts give an equal tokenizer.

    Args:
        texts: documents, read until `TRAINED_ON_CHARS` characters are seen.
        vocab_size: number of tokens, the 256 bytes and the document border among them. Fewer where the texts do not
            have as many different pieces.

    Returns:
        A fast tokenizer without chat template. It puts the border before a text that it encodes, as training does.

    Raises:
        UserError: the vocabulary is too small, or there is no text.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"data.vocab_size is {vocab_size}: at least {SMALLEST} are needed, a token for each byte")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BORDER],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Beginning(texts)
    backend.train_from_iterator(seen, trainer)
    if not seen.chars:
        raise UserError("no text to train a tokenizer on: every document is empty")
    border = backend.token_to_id(BORDER)
    backend.post_processor = processors.TemplateProcessing(single=f"{BORDER} $A", special_tokens=[(BORDER, border)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BORDER,
        eos_token=BORDER,
        pad_token=BORDER,
        clean_up_tokenization_spaces=False,
    )


class _Beginning:
    """The first texts, until enough characters were seen."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts, self.chars = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.chars >= TRAINED_ON_CHARS:
                return
            self.chars += len(text)
            yield text
