"""A tokenizer small enough to train in a test, with the chat templates of tests/fixtures/templates."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"
# What each template writes at the end of a turn, and the tokenizer's own end-of-sequence token beside it.
END_OF = {
    "chatml": "<|im_end|>",
    "chatml_generation": "<|im_end|>",
    "hybrid_thinking": "<|im_end|>",
    "opens_think": "<|im_end|>",
    "drops_thoughts": "</s>",
    "headers": "<|eot_id|>",
    "inst": "</s>",
    "model_role": "<end_of_turn>",
    "doubles_think": "<|im_end|>",
}
SPECIAL = [
    *("<unk>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"),
    *("<|start_header|>", "<|end_header|>", "<|eot_id|>", "<|eom_id|>", "<start_of_turn>", "<end_of_turn>"),
]
CORPUS = [
    "user assistant system model\nLet me think. Wait, 12 + 30 is 42.\n\nSo the answer is 42.\n\n",
    "the colour of the flower is red, but then the peel of the fruit is not\n\n\n",
    "the end of a turn.\n\nThe answer is the flower.\n",
]


def build_tokenizer(template: str | None = None, *, eos: str = "</s>", pad: str | None = "<pad>", **options):
    """A byte-level BPE tokenizer with a few merges and the special tokens of all template families."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>", pad_token=pad, **options
    )
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer
