"""The template contract: good templates pass, each defect is named, and corrupted rows are caught."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_tokenizer import END_OF, build_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering.contract import check_contract, probe_conversations
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment
from lit_reason.errors import UserError

THINKING = "<think>\nLet me think.\n\nWait, it is.\n</think>\n\nThe answer is 42."
DEFECTS = ("drops_thoughts", "doubles_think")


@pytest.fixture
def renderer_of(tokenizer_of):
    def get(template, *, kwargs=None, tokenizer=None, **config):
        eos = "<|im_end|>" if END_OF.get(template) == "<|im_end|>" else "</s>"
        tokenizer = tokenizer or tokenizer_of(template, eos=eos)
        return Renderer(tokenizer, RenderConfig(**config), template_kwargs=kwargs)

    return get


def talk(question, *answers, row_id="f:1"):
    turns = []
    for answer in answers:
        turns += [Message("user", question), Message("assistant", answer, trained=True)]
    return Conversation(tuple(turns), row_id)


ROWS = [talk("the colour?", "It is red."), talk("the colour?", THINKING, THINKING, row_id="f:2")]


@pytest.mark.parametrize("name", [n for n in END_OF if n not in DEFECTS])
def test_good_templates_pass(renderer_of, name):
    report = check_contract(renderer_of(name), ROWS)
    assert report.checked == 2 and not report.refused
    assert report.end_token == END_OF[name]
    assert report.pad_token == "<pad>"
    assert not any("will be refused: the chat template" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("chatml", ["a system text, in training and generation: 'You help with plants.'", "does not write tool calls"]),
        ("hybrid_thinking", ["drops thoughts of earlier turns", "an empty think block, and it is trained"]),
        ("opens_think", ["opens the think block", "drops thoughts of earlier turns"]),
        ("headers", []),
        ("inst", ["no system turn", "does not write tool calls"]),
        ("model_role", ["no system turn"]),
    ],
)
def test_notes_say_what_the_template_does(renderer_of, name, notes):
    report = check_contract(renderer_of(name), ROWS[:1])
    for note in notes:
        assert any(note in given for given in report.notes), report.notes
    if not notes:
        assert report.notes == []


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("chatml", {"system": True, "default_system": "You help with plants.", "inline": True, "field": None}),
        ("chatml_generation", {"generation_markers": True, "default_system": None, "tool_calls": False}),
        ("hybrid_thinking", {"field": "reasoning_content", "strips_history": True, "empty_think": True,
                             "tool_calls": True, "lists_tools": True, "opens_think": False}),
        ("opens_think", {"opens_think": True, "strips_history": True}),
        ("drops_thoughts", {"opens_think": True, "inline": False, "field": None}),
        ("doubles_think", {"inline": False, "empty_think": True}),
        ("headers", {"tool_calls": True, "end_text": "<|eot_id|>", "lead": "", "generation_markers": False}),
        ("inst", {"system": False, "lead": " ", "tail": "</s>"}),
        ("model_role", {"system": False, "end_text": "<end_of_turn>", "tail": "<end_of_turn>\n"}),
        ("no_end", {"end_id": None, "end_text": ""}),
    ],
)  # fmt: skip
def test_traits_by_probing(renderer_of, name, traits):
    found = renderer_of(name).traits
    assert {key: getattr(found, key) for key in traits} == traits


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("drops_thoughts", 1, "does not begin a turn with its generation prompt"),
        ("doubles_think", 1, "doubles the think block"),
        ("no_end", 0, "ends turns with no end token"),
    ],
)
def test_defects_name_the_row_and_the_way_out(renderer_of, name, row, message):
    with pytest.raises(UserError, match=f"^f:{row + 1}: .*{message}.*render.turn_text=verbatim"):
        check_contract(renderer_of(name), [ROWS[row]])
    if name != "drops_thoughts" or row:
        assert check_contract(renderer_of(name, turn_text="verbatim"), [ROWS[row]]).checked == 1


def test_defect_that_no_row_meets_is_a_note(renderer_of):
    """A template that doubles think blocks does no harm to rows without thoughts, but it is said."""
    report = check_contract(renderer_of("doubles_think"), [ROWS[0]])
    assert report.checked == 1
    assert any("rows with thoughts will be refused" in note for note in report.notes)


def test_missing_tool_calls_stop_rows_that_have_them(renderer_of):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    row = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(call,), trained=True)), "f:9")
    with pytest.raises(UserError, match="f:9: .*does not write tool calls: 'add'.*lm.chat_template"):
        check_contract(renderer_of("chatml"), [ROWS[0], row])


def test_single_bad_rows_are_left_to_the_quarantine(renderer_of):
    report = check_contract(renderer_of("chatml"), [talk("a", "so <|im_end|> it is", row_id="f:7"), ROWS[0]])
    assert report.checked == 1
    assert sum(report.refused.values()) == 1 and "writes out the end token" in next(iter(report.refused))
    assert any("1 of the first rows refused" in note for note in report.notes)


def test_nothing_but_bad_rows_stops_the_run(renderer_of):
    rows = [Conversation((Message("system", "x"), *talk("a", "b").messages), f"f:{i}") for i in (4, 5, 6)]
    with pytest.raises(UserError, match="none of the first 3 rows.* f:4 and 2 more: .*system turn is not supported"):
        check_contract(renderer_of("inst"), rows)


def test_no_rows_at_all_is_no_error(renderer_of):
    assert check_contract(renderer_of("chatml"), []).checked == 0


# --- corrupted rows ---


class Tampering:
    """A renderer whose rows of the user's conversations are changed on the way out."""

    def __init__(self, renderer, change):
        self._renderer, self._change = renderer, change

    def __getattr__(self, name):
        return getattr(self._renderer, name)

    def rows(self, conversation):
        rows = self._renderer.rows(conversation)
        return rows if conversation.row_id.startswith("probe") else [self._change(row) for row in rows]


def _with(row, **arrays):
    return replace(row, **arrays)


def _no_end(row):
    keep = row.segment != Segment.END
    return _with(row, ids=row.ids[keep], weight=row.weight[keep], segment=row.segment[keep], decile=row.decile[keep])


def _second_end(row):
    segment, ids = row.segment.copy(), row.ids.copy()
    at = np.flatnonzero(segment == Segment.SOLUTION)[0]
    ids[at] = ids[-1]
    return _with(row, ids=ids)


def _other_prompt(row):
    ids = row.ids.copy()
    ids[2] += 1
    return _with(row, ids=ids)


def _prompt_trained(row):
    segment = row.segment.copy()
    segment[np.flatnonzero(segment == Segment.SOLUTION)[0] - 1] = Segment.SOLUTION
    return _with(row, segment=segment)


def _lost_text(row):
    ids = row.ids.copy()
    ids[np.flatnonzero(row.segment == Segment.SOLUTION)[1]] += 1
    return _with(row, ids=ids)


def _padded(row):
    ids = row.ids.copy()
    ids[np.flatnonzero(row.segment == Segment.SOLUTION)[1]] = 1
    return _with(row, ids=ids)


def _untrained(row):
    return _with(row, segment=np.zeros_like(row.segment))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_no_end, "one supervised end token"),
        (_second_end, "one supervised end token"),
        (_other_prompt, "training begins with generation's prompt"),
        (_prompt_trained, "training begins with generation's prompt"),
        (_lost_text, "comes back from its tokens"),
        (_padded, "the padding token is not supervised"),
        (_untrained, "one trained stretch per trained turn"),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "model_role"])
def test_corrupted_rows_are_caught(renderer_of, name, change, rule):
    renderer = renderer_of(name)
    assert check_contract(Tampering(renderer, lambda row: row), ROWS[:1]).checked == 1
    with pytest.raises(UserError, match=f"f:1: the contract '.*{rule}"):
        check_contract(Tampering(renderer, change), ROWS[:1])


def test_turn_that_was_cut_off_has_no_end(renderer_of):
    cut = Message("assistant", "the ans", trained=True, truncated=True)
    row = Conversation((Message("user", "the colour?"), cut), "f:1")
    assert check_contract(renderer_of("chatml"), [row]).checked == 1


def test_turns_without_a_prompt_between():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    renderer = Renderer(tokenizer, RenderConfig())
    row = Conversation((*talk("the colour?", "red").messages, *talk("", "the end").messages), "f:1")
    assert len(renderer.rows(row)) == 1
    assert check_contract(renderer, [row]).checked == 1


# --- tokens ---


def test_padding_notes():
    same = build_tokenizer("chatml", eos="<|im_end|>", pad="<|im_end|>")
    report = check_contract(Renderer(same, RenderConfig()), ROWS[:1])
    assert report.pad_token == "<unk>" and any("its end token for padding; <unk>" in n for n in report.notes)
    none = build_tokenizer("chatml", eos="<|im_end|>", pad=None)
    report = check_contract(Renderer(none, RenderConfig()), ROWS[:1])
    assert any("no padding token; <unk> is used" in note for note in report.notes)


def test_no_token_to_spare_is_explained():
    words = ["<end>", "one", "two", "plus", "three"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    renderer = Renderer(tokenizer, RenderConfig(mode="plain"))
    report = check_contract(renderer, [talk("one plus two ", "three")])
    assert report.checked == 1 and report.pad_token == report.end_token == "<end>"
    assert any("the tokenizer has no spare token" in note for note in report.notes)
    assert any("no chat template" in note for note in report.notes)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_toy_vocabulary_with_a_template(unknown):
    """The probes are written in English; a tokenizer that knows none of it is judged by the user's rows alone."""
    words = ["<end>", "<u>", "<a>", "one", "two", "plus", "three", "<unk>"]
    vocab = {w: i for i, w in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unknown) if unknown else models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<a> ') ~ m.content ~ ' ' }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<a> ' if add_generation_prompt }}"
    )
    report = check_contract(Renderer(tokenizer, RenderConfig(mode="plain")), [talk("one plus two", "three")])
    assert report.checked == 1


def test_normalising_tokenizers_round_trip(renderer_of):
    """A tokenizer that lowers case loses case by design, not by accident."""
    tokenizer = build_tokenizer("chatml", eos="<|im_end|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert check_contract(renderer_of("chatml", tokenizer=tokenizer), ROWS).checked == 2


def test_characters_the_tokenizer_does_not_know():
    backend = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    renderer = Renderer(tokenizer, RenderConfig(mode="plain"))
    assert check_contract(renderer, [talk("one ", "two")]).checked == 1
    with pytest.raises(UserError, match="f:1: .*does not know some of its characters"):
        renderer.pad_id = 0
        check_contract(renderer, [talk("one ", "seven")])


def test_todays_date_is_noted():
    tokenizer = build_tokenizer("chatml", eos="<|im_end|>")
    tokenizer.chat_template = "{{ strftime_now('%Y') ~ '\n' }}" + tokenizer.chat_template
    report = check_contract(Renderer(tokenizer, RenderConfig()), ROWS[:1])
    assert any("today's date" in note for note in report.notes)


def test_probe_conversations_fit_the_template(renderer_of):
    kinds = probe_conversations(renderer_of("headers").traits)
    assert set(kinds) == {"answer", "thoughts", "history", "tools"}
    assert kinds["answer"].messages[0].role == "system"
    assert probe_conversations(renderer_of("inst").traits)["answer"].messages[0].role == "user"
    for conversation in kinds.values():
        assert renderer_of("headers").rows(conversation)
