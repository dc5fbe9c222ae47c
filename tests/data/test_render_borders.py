"""Rendering at the border between prompt and answer, where one token may lie across it."""

from rendered_talks import talk, trained_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_reason.data.config import RenderConfig
from lit_reason.data.rendering.render import Renderer


def test_token_across_the_border_is_cut_there(renderer_of):
    """An answer that begins with a newline would melt into the newline that ends the prompt."""
    renderer = renderer_of("chatml")
    conversation = talk("the colour?", "\n\nIt is red.")
    prompt = renderer.prompt(conversation)
    [row] = renderer.rows(conversation)
    text = renderer.tokenizer.decode(row.ids.tolist())
    whole = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # the case this test is about
    assert row.ids[: len(prompt)].tolist() == prompt
    assert trained_text(renderer, row) == "\n\nIt is red.<|im_end|>"


def test_border_that_moves_with_the_next_character(renderer_of):
    """No token crosses the border, and still the prompt alone has other tokens than within the text."""
    renderer = renderer_of("headers")
    conversation = talk("the colour?", "It is red.", "again", "red")
    rows = renderer.rows(conversation)
    assert len(rows) == 2  # one text would not begin with generation's prompt at both turns
    for k, row in zip((1, 3), rows, strict=True):
        prompt = renderer.prompt_before(conversation, k)
        assert row.ids[: len(prompt)].tolist() == prompt


def test_tokenizer_that_puts_blanks_before_texts(tokenizer_of):
    """A SentencePiece-like tokenizer must not put a blank before the answer when it is encoded apart."""
    vocab = {
        c: i
        for i, c in enumerate(["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz[]/INST?.", "<0x0A>", "\n\n", "\n"])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST]' ~ m.content ~ '\n' if m.role == 'user' else "
        "m.content ~ eos_token }}{% endfor %}"
    )
    renderer = Renderer(tokenizer, RenderConfig())
    conversation = talk("a?", "\nred")
    [row] = renderer.rows(conversation)
    prompt = renderer.prompt(conversation)
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    assert tokens[: len(prompt)][-1] == "\n"
    assert tokens[len(prompt) :] == ["\n", "r", "e", "d", "</s>"]

    piece = renderer.encoder.encode_piece("\nred")
    assert piece.start.tolist() == [0, 1, 2, 3] and piece.end.tolist() == [1, 2, 3, 4]


def test_unknown_word_across_the_border_is_cut_there():
    """Prompt alone and whole text have the same ids here, and still the token belongs to both sides."""
    backend = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    [row] = Renderer(tokenizer, RenderConfig(mode="plain")).rows(talk("fo", "o two"))
    assert row.ids.tolist() == [1, 1, 2, 0]
    assert row.weight.tolist() == [0, 1, 1, 1]
