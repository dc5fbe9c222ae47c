"""The X-ray: spans that tile a row, findings from templates and rows with a defect, none from healthy ones."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import END_OF, build_tokenizer

from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.datamodule import TraceData
from lit_reason.data.inspection import xray_scan
from lit_reason.data.inspection.xray import (
    KINDS,
    Finding,
    answer_finding,
    as_written,
    decoded,
    examine,
    kept_thoughts,
    spans,
)
from lit_reason.data.inspection.xray_scan import EXAMPLES, Scan, Tally
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.errors import RowError, UserError

HEALTHY = [name for name in END_OF if name not in ("drops_thoughts", "doubles_think")]
THINKING = "<think>\nLet me think.\n\nWait, 12 + 30 is 42.\n</think>\n\nThe answer is 42."
HEAD = "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
TAIL = (
    "{{- '<|im_end|>' -}}{%- else -%}{{- '<|user|>' ~ m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
EMPTIES = HEAD + "{{- '<|assistant|><think>\n\n</think>' ~ m.content.split('</think>')[-1] -}}" + TAIL
DROPS = HEAD + "{{- '<|assistant|>' ~ m.content.split('</think>')[-1] -}}" + TAIL
DOUBLES_LATE = HEAD + "{{- '<|assistant|>' ~ m.content.replace('</think>', '</think><think></think>') -}}" + TAIL
LEAVES_OPEN = (HEAD + "{{- '<|assistant|><think>' ~ m.content -}}" + TAIL).replace(
    "'<|assistant|>' -}}{%- endif", "'<|assistant|><think>' -}}{%- endif"
)


def renderer_of(template=None, *, source=None, **config):
    eos = END_OF.get(template, "<|im_end|>")
    tokenizer = build_tokenizer(template, eos=eos if eos in ("<|im_end|>", "</s>") else "</s>")
    if source is not None:
        tokenizer.chat_template = source
    return Renderer(tokenizer, RenderConfig(**config))


def talk(*contents, **fields):
    messages = [Message("assistant", c, trained=True) if i % 2 else Message("user", c) for i, c in enumerate(contents)]
    return Conversation(tuple(messages), "f:1", **fields)


def kinds(renderer, conversation):
    return {finding.kind for finding in examine(renderer, conversation)[1]}


# --- spans


def letters(ids):
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(min_size=1, max_size=40), st.data())
def test_spans_tile_any_row(text, data):
    """Tokens are bytes here, so that borders fall inside characters."""
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    size = len(ids)
    lists = st.lists(st.sampled_from([0, 1]), min_size=size, max_size=size)
    segment, weight, decile = (np.array(data.draw(lists)) for _ in range(3))
    row = TokenRow(ids, weight.astype(np.float32) / 2, segment.astype(np.uint8) * 6, decile.astype(np.int8) - 1, "f:1")
    found = spans(row, letters)
    assert [s.first for s in found] == [0, *(s.stop for s in found[:-1])] and found[-1].stop == size
    assert "".join(s.text for s in found) == text
    labels = [(int(s.segment), s.weight, s.decile) for s in found]
    assert all(a != b for a, b in zip(labels, labels[1:], strict=False))
    for span, (kind, weight, decile) in zip(found, labels, strict=True):
        part = slice(span.first, span.stop)
        assert len(span) > 0 and span.trained == (weight > 0)
        assert (row.segment[part] == kind).all() and (row.weight[part] == weight).all()
        assert (row.decile[part] == decile).all()


@pytest.mark.parametrize("template", HEALTHY)
def test_spans_tile_rendered_rows(template):
    renderer = renderer_of(template)
    [row] = renderer.rows(talk("the colour? é✓", THINKING))
    found = spans(row, lambda ids: decoded(renderer, ids))
    assert "".join(s.text for s in found) == decoded(renderer, row.ids.tolist())
    assert sum(map(len, found)) == len(row)
    assert [s.name for s in found if not s.trained] == ["prompt"] * sum(s.segment == 0 for s in found)
    assert next(s for s in found if s.segment == Segment.END).text == END_OF[template]


def test_an_empty_row_has_no_spans():
    none = np.zeros(0)
    assert spans(TokenRow(none, none, none, none, "f:1"), letters) == []


def test_kept_thoughts():
    trace = Trace(tuple("abcdef"), (0, 1, 2, 5, 8, 9), 10)
    assert kept_thoughts(trace) == "1-3, 6, 9-10 of 10"
    assert kept_thoughts(Trace((), (), 4)) == "none of 4"


# --- healthy rows


@pytest.mark.parametrize("template", HEALTHY)
@pytest.mark.parametrize(
    "contents", [("the colour?", "It is red: 42"), ("the colour?", THINKING), ("a", THINKING, "and?", THINKING)]
)
def test_healthy_rows_have_no_findings(template, contents):
    rows, findings = examine(renderer_of(template), talk(*contents, answer="42"))
    assert rows and findings == []


def test_healthy_documents_tools_and_turns_verbatim():
    renderer = renderer_of("hybrid_thinking")
    call = Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},))
    tools = (Message("user", "q"), call, Message("tool", "8"), Message("assistant", "42", trained=True))
    assert kinds(renderer, Conversation(tools, "f:1", answer="42")) == set()
    assert kinds(renderer, Conversation((Message("text", "<think> is a word", trained=True),), "f:1")) == set()
    assert kinds(renderer_of("drops_thoughts", turn_text="verbatim"), talk("q", THINKING, answer="42")) == set()
    assert kinds(renderer_of(mode="plain"), talk("q", THINKING, answer="42")) == set()


def test_a_quoted_marker_is_no_second_block():
    quoting = THINKING.replace("Wait", "The user wrote <think> twice. Wait")
    assert kinds(renderer_of("chatml"), talk("q", quoting)) == set()


# --- defects of templates


@pytest.mark.parametrize(
    ("renderer", "contents", "expected"),
    [
        (renderer_of("doubles_think"), ("q", THINKING), {"think_doubled"}),
        (renderer_of("doubles_think"), ("q", "It is red."), set()),
        (renderer_of(source=DOUBLES_LATE), ("q", THINKING), {"think_doubled"}),
        (renderer_of("drops_thoughts"), ("q", THINKING), {"think_dropped", "prompt_differs"}),
        (renderer_of(source=DROPS), ("q", THINKING), {"think_dropped"}),
        (renderer_of(source=EMPTIES), ("q", THINKING), {"think_emptied"}),
        (renderer_of(source=LEAVES_OPEN), ("q", "It is red."), {"think_unclosed"}),
        (renderer_of("opens_think", turn_text="verbatim"), ("q", "It is red."), {"think_unclosed"}),
        (renderer_of("no_end"), ("q", "It is red."), {"end_untrained"}),
        (renderer_of("no_end"), ("q", THINKING), {"end_untrained"}),
    ],
)
def test_templates_with_a_defect(renderer, contents, expected):
    rows, findings = examine(renderer, talk(*contents))
    assert {finding.kind for finding in findings} == expected
    assert {finding.row_id for finding in findings} <= {"f:1"}
    assert all(finding.detail and KINDS[finding.kind] in str(finding) for finding in findings)


def test_each_turn_is_looked_at_but_told_once():
    findings = examine(renderer_of(source=DROPS), talk("q", THINKING, "r", THINKING))[1]
    assert [finding.kind for finding in findings] == ["think_dropped"]
    assert kinds(renderer_of(source=DROPS), talk("q", "It is red.", "r", THINKING)) == {"think_dropped"}


def test_a_doubled_block_in_one_row_of_several():
    """The template strips earlier thoughts, so each turn has its own row; the second row's own text is at fault."""
    source = renderer_of("opens_think").tokenizer.chat_template
    closing = r"'\n</think>\n\n'"
    doubled = r"('\n</think><think></think>\n\n' if 'Wait' in thoughts else '\n</think>\n\n')"
    assert closing in source
    source = source.replace(closing, doubled)
    first = "<think>\nLet me think.\n</think>\n\nIt is red."
    rows, findings = examine(renderer_of(source=source), talk("q", first, "r", THINKING))
    assert [row.row_id for row in rows] == ["f:1#1", "f:1#2"]
    assert [(f.kind, f.row_id) for f in findings] == [("think_doubled", "f:1#2")]


CALLING = Conversation(
    (
        Message("user", "q"),
        Message("assistant", "", tool_calls=({"function": {"name": "peel", "arguments": {}}},), trained=True),
    ),
    "f:1",
)


@pytest.mark.parametrize("template", ["chatml", "opens_think"])
def test_calls_that_the_template_does_not_write(template):
    rows, [finding] = examine(renderer_of(template), CALLING)
    assert rows == [] and finding.kind == "text_lost" and "peel" in finding.detail


def test_an_end_token_that_begins_like_the_prompt_is_seen():
    """The prompt goes on `<think>` where the turn ends with `</s>`: both begin with the same character."""
    rows, findings = examine(renderer_of("drops_thoughts"), CALLING)
    assert [finding.kind for finding in findings] == ["prompt_differs"]


def test_training_and_generation_prompts_that_disagree(monkeypatch):
    renderer = renderer_of("chatml")
    monkeypatch.setattr(renderer, "prompt_before", lambda conversation, turn: [7, 8])
    rows, [finding] = examine(renderer, talk("q", "It is red."))
    assert len(rows) == 1 and finding.kind == "prompt_differs" and "generation has" in finding.detail


def test_what_the_template_makes_of_a_record():
    talking = talk("q", THINKING)
    assert as_written(renderer_of(source=DROPS), talking) == "<|user|>q<|assistant|>\n\nThe answer is 42.<|im_end|>"
    refused = Conversation((Message("system", "s"), *talking.messages), "f:1")
    assert "system" in as_written(renderer_of("model_role"), refused)
    assert as_written(renderer_of(mode="plain"), talking) == as_written(renderer_of(source=DROPS), None) == ""


# --- defects of rows


@pytest.mark.parametrize(
    ("config", "content", "expected"),
    [
        ({"weights": {"solution": 0, "end": 0}}, "It is red.", {"empty_mask"}),
        ({"weights": {"end": 0}}, "It is red.", {"end_untrained"}),
        ({"weights": {"end": 0.5}}, "It is red.", set()),
        ({}, "It <pad> is red.", {"padding_trained"}),
    ],
)
def test_rows_with_a_defect(config, content, expected):
    assert kinds(renderer_of("chatml", **config), talk("q", content)) == expected


def test_a_row_without_a_trained_turn():
    silent = Conversation((Message("user", "q"), Message("assistant", "a")), "f:1")
    assert kinds(renderer_of("chatml"), silent) == {"empty_mask"}


def test_a_row_at_fault_by_itself_is_no_finding():
    with pytest.raises(RowError, match="writes out the end token"):
        examine(renderer_of("chatml"), talk("q", "It <|im_end|> is red."))


def test_text_that_the_tokenizer_loses():
    renderer = renderer_of("chatml")
    whole = renderer.tokenizer.decode
    renderer.tokenizer.decode = lambda ids, **options: whole(ids, **options).replace("red", "")
    assert kinds(renderer, talk("q", "It is red.")) == {"text_lost"}


@pytest.mark.parametrize(
    ("turn", "lost"),
    [
        (Message("assistant", "<think>so 42</think>Done.", trained=True), False),
        (Message("assistant", "<think>so 41</think>The answer is 42.", trained=True), False),
        (Message("assistant", "<think>so 42</think>The answer is 41.", trained=True), True),
        (Message("assistant", "Done.", reasoning="so 42", trained=True), False),
        (Message("assistant", "Done.", reasoning="so 41", trained=True), True),
        (Message("assistant", "<think>first 1, th", trained=True, truncated=True), True),
        (Message("assistant", "The answer is 41."), False),
        (Message("assistant", "I look it up.", trained=True, tool_calls=({"function": {}},)), False),
    ],
)
def test_the_answer_follows_from_what_is_left(turn, lost):
    conversation = Conversation((Message("user", "q"), turn), "f:1", answer="42")
    finding = answer_finding(conversation)
    assert (finding is not None) is lost
    assert finding is None or (finding.kind == "answer_lost" and "'42'" in finding.detail)
    assert answer_finding(Conversation(conversation.messages, "f:1")) is None


def test_the_answer_belongs_to_the_last_trained_turn():
    assert kinds(renderer_of("chatml"), talk("q", "It is 41.", "r", "It is 42.", answer="42")) == set()
    assert kinds(renderer_of("chatml"), talk("q", "It is 42.", "r", "It is 41.", answer="42")) == {"answer_lost"}


# --- tally


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.floats(0.01, 1))
def test_lengths_by_nearest_rank(lengths, share):
    tally = Tally()
    tally.lengths.update(lengths)
    assert tally.length_at(share) == sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def test_a_tally_keeps_few_examples_and_counts_each_record_once():
    tally = Tally()
    assert tally.length_at(0.5) == 0 and tally.trained_share == 0
    for n in range(20):
        twice = [Finding("text_lost", f"f:{n}", "x"), Finding("text_lost", f"f:{n}", "y")]
        tally.add_findings([*twice, Finding("empty_mask", f"f:{n}", "z")] if n else twice)
    tally.add_findings([])
    assert tally.findings == {"text_lost": 20, "empty_mask": 19} and tally.failed == 20
    told = tally.in_order()
    assert [f.row_id for f in told] == [f"f:{n}" for n in (*range(1, 6), *range(5))]
    assert len(told) == 2 * EXAMPLES and told[0].kind == "empty_mask"


# --- a whole file


def scan_of(tmp_path, records, *, split="train", template="chatml", **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    data = TraceData(train_file=None if split != "train" else str(path), test_file=str(path), **settings)
    data.tokenizer = build_tokenizer(template, eos="<|im_end|>")
    return Scan(data, split)


def record(content, **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}], **more}


def test_a_file_in_figures(tmp_path):
    silent = record("It is red.")
    silent["messages"][1]["weight"] = 0
    rows = [record(THINKING, answer="42"), "{broken\n", record("It is 41.", answer="42"), silent, {"messages": []}]
    scan = scan_of(tmp_path, rows)
    pictures = list(scan)
    tally = scan.tally
    assert [p.row_id for p in pictures] == [f"rows.jsonl:{n}" for n in (1, 3, 4, 5)]
    assert (tally.records, tally.rows, scan.unusable.total, tally.failed) == (3, 2, 2, 2)
    assert tally.findings == {"answer_lost": 1, "empty_mask": 1}
    assert [f.row_id for f in tally.in_order()] == ["rows.jsonl:4", "rows.jsonl:3"]
    kept = [row for p in pictures for row in p.rows]
    assert tally.tokens.sum() == sum(map(len, kept)) and tally.lengths.total() == 2
    assert tally.trained.sum() == sum((row.weight > 0).sum() for row in kept)
    assert tally.tokens[Segment.END] == tally.trained[Segment.END] == 2 and tally.trained[Segment.PROMPT] == 0
    assert pictures[3].reason.startswith("unusable: ")
    assert scan.condenser.ledger.thoughts["traces"] == 1


@pytest.mark.parametrize("policy", ["drop", "fit", "raise"])
def test_rows_over_the_length(tmp_path, policy):
    thoughts = "\n\n".join(f"It is thought number {n} of the trace." for n in range(12))
    rows = [record(f"<think>\n{thoughts}\n</think>\n\n42"), record("the " * 300), record("It is red.")]
    scan = scan_of(tmp_path, rows, max_length=250, over_length=policy)
    first, second, _ = list(scan)
    tally = scan.tally
    assert tally.over == 2 and tally.lengths.total() == 3 and tally.length_at(1) > 250
    if policy == "fit":
        assert len(first.rows[0]) <= 250 and not first.reason and tally.rows == 2
        assert sum(tally.dropped.values()) == 1 and second.reason.startswith("too long even")
    else:
        assert tally.rows == 1 and sum(tally.dropped.values()) == 2 and first.reason and second.reason
    assert tally.findings == ({"too_long": 2} if policy == "raise" else {})


def test_a_split_has_its_own_condensation(tmp_path):
    thoughts = "\n\n".join(f"It is thought number {n} of the trace." for n in range(10))
    rows = [record(f"<think>\n{thoughts}\n</think>\n\n42")]
    half = CondenseConfig(strategy="epic", min_tokens=0)
    settings = {"condense": CondenseConfig(), "condense_val": half}
    [whole] = scan_of(tmp_path, rows, **settings)
    [short] = scan_of(tmp_path, rows, split="test", **settings)
    assert kept_thoughts(whole.conversation.messages[1].trace) == "1-10 of 10"
    assert len(short.conversation.messages[1].trace.thoughts) < 10


def test_rows_that_condensation_drops(tmp_path):
    scan = scan_of(tmp_path, [record("<think>cut"), record("It is red.")])
    dropped, _ = list(scan)
    assert "condensation" in dropped.reason and scan.tally.rows == 1 and scan.tally.failed == 0
    assert scan.tally.records == 2


def test_a_missing_file_and_a_broken_probe(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="data.val_file is missing"):
        scan_of(tmp_path, [record("a")], split="val")

    def broken(renderer, conversations):
        raise UserError("probe:answer: the contract is broken")

    monkeypatch.setattr(xray_scan, "check_contract", broken)
    scan = scan_of(tmp_path, [record("It is red.")])
    list(scan)
    assert scan.tally.findings == {"contract": 1} and scan.tally.records == 1
