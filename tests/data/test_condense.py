"""The rules around the strategies: markers, answers, turns, settings, fitting to a length, truncation, ledger."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.condensation.ledger import Ledger, TurnRecord
from lit_reason.data.condensation.markers import MARKERS
from lit_reason.data.condensation.selection import BY_THOUGHT
from lit_reason.data.config import CondenseConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.reading.turns import presplit_trace
from lit_reason.errors import RowError, UserError

TEN = [f"thought number {i} of all" for i in range(10)]  # five words each
TRACE = "\n" + "\n\n".join(TEN) + "\n"


def words(text):
    return len(text.split())


def condenser(**settings):
    return Condenser(CondenseConfig(**{"strategy": "epic", "min_tokens": 0, **settings}), words)


def reply(text, **fields):
    return Message("assistant", text, **{"trained": True, "content_path": ("a",), **fields})


def chat(*messages, answer=None):
    return Conversation(tuple(messages), "rows.jsonl:1", answer=answer)


def think(trace=TRACE, solution="It is 7."):
    return reply(f"<think>{trace}</think>{solution}")


USER = Message("user", "What is it?")


# Markers and missing traces


def test_a_lone_closing_marker_ends_a_trace():
    done = condenser()(chat(USER, reply(f"{TRACE}</think>7")))
    assert done.messages[1].content == f"{done.messages[1].trace.text}</think>7"
    assert done.messages[1].trace.origin == (0, 1, 2, 8, 9)


def test_a_reasoning_field_is_condensed_in_place():
    done = condenser()(chat(USER, reply("7", reasoning=TRACE, reasoning_path=("r",))))
    assert done.messages[1].content == "7"
    assert done.messages[1].reasoning == done.messages[1].trace.text
    assert done.messages[1].trace.origin == (0, 1, 2, 8, 9)


@pytest.mark.parametrize("rule", ["drop", "passthrough"])
def test_an_unclosed_trace_is_never_condensed(rule):
    one = condenser(on_open=rule)
    before = chat(USER, reply(f"<think>{TRACE}"))
    done = one(before)
    assert done == (None if rule == "drop" else before)
    name = "dropped" if rule == "drop" else "unchanged"
    assert one.ledger.rows == {f"{name}: trace without a closing marker": 1}


def test_turns_without_markers():
    before = chat(USER, reply(f"{TRACE}So the answer is 7."))
    assert condenser()(before) == before
    dropping = condenser(on_missing="drop")
    assert dropping(before) is None and dropping.ledger.rows == {"dropped: no trace": 1}
    with pytest.raises(RowError, match="on_missing"):
        condenser(on_missing="raise")(before)
    whole = condenser(on_missing="whole")(before)
    assert whole.messages[1].trace.origin == (0, 1, 2, 8, 9)
    assert whole.messages[1].content == whole.messages[1].trace.text + "So the answer is 7."


def test_a_tool_call_without_text_is_not_a_missing_trace():
    call = reply("", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},))
    before = chat(USER, call, Message("tool", "3"), reply(f"<think>{TRACE}</think>3"))
    done = condenser(on_missing="drop")(before)
    assert done.messages[1] == call and done.messages[3].trace.origin == (0, 1, 2, 8, 9)


def test_several_traces_in_one_turn_stay():
    one = condenser()
    before = chat(USER, reply(f"<think>{TRACE}</think>shown<think>{TRACE}</think>7"))
    assert one(before) == before
    assert one.ledger.rows == {"unchanged: several traces in one turn": 1}


@pytest.mark.parametrize("trace", ["", "\n\n"])
def test_an_empty_trace_stays(trace):
    before = chat(USER, think(trace))
    assert condenser()(before) == before


def test_plain_text_is_condensed_only_between_both_markers():
    text = Message("text", f"Q: what?\n{TRACE}</think>7", trained=True)
    assert condenser()(chat(text)) == chat(text)
    both = replace(text, content=f"Q: what?\n<think>{TRACE}</think>7")
    done = condenser()(chat(both)).messages[0]
    assert done.content == f"Q: what?\n<think>{done.trace.text}</think>7"
    assert len(done.trace.origin) == 5


FRAGMENTS = st.lists(
    st.one_of(st.sampled_from([m for pair in MARKERS[:3] for m in pair] + ["\n\n", TRACE]), st.text(max_size=9)),
    max_size=8,
).map("".join)


@given(FRAGMENTS, st.sampled_from(["full", *BY_THOUGHT]), st.sampled_from(["passthrough", "whole"]))
def test_nested_and_unclosed_markers_never_crash(text, strategy, missing):
    one = condenser(strategy=strategy, on_missing=missing)
    done = one(chat(USER, reply(text)))
    assert sum(one.ledger.rows.values()) == 1
    if done is None:
        assert one.ledger.rows == {"dropped: trace without a closing marker": 1}
    elif strategy == "full" or not one.ledger.rows["condensed"]:
        assert done.messages[1].content == text
    else:
        assert len(done.messages[1].content) < len(text)
        assert done.messages[1].trace.text in done.messages[1].content


# Short traces, huge thoughts


def test_short_traces_stay_and_keep_their_trace():
    one = condenser(min_tokens=51)
    before = chat(USER, think())
    done = one(before)
    assert done.messages[1].content == before.messages[1].content
    assert done.messages[1].trace.origin == tuple(range(10))
    assert one.ledger.rows == {"unchanged: trace shorter than min_tokens": 1}
    assert condenser(min_tokens=50)(before).messages[1].trace.origin == (0, 1, 2, 8, 9)


def test_few_thoughts_stay():
    for count, changed in ((2, False), (3, True)):
        one = condenser()
        one(chat(USER, think("\n\n".join(TEN[:count]))))
        assert one.ledger.rows == {"condensed" if changed else "unchanged: too few thoughts": 1}


def test_one_paragraph_is_cut_into_sentences():
    done = condenser()(chat(USER, think(" ".join(f"Sentence number {i} is here." for i in range(6)))))
    assert done.messages[1].trace.origin == (0, 1, 5)
    assert done.messages[1].trace.text == (
        "Sentence number 0 is here. Sentence number 1 is here. Sentence number 5 is here."
    )


def test_a_huge_thought_that_cannot_be_cut_counts_by_tokens():
    huge = "word " * 100
    one = condenser(strategy="head", tau=0.9)
    done = one(chat(USER, think(f"{TEN[0]}\n\n{TEN[1]}\n\n{huge}\n\n{TEN[2]}\n\n{TEN[3]}")))
    # By thoughts 5 of 5 would stay; 90 % of 120 words end before the thought of 100.
    assert done.messages[1].trace.origin == (0, 1)
    assert one.ledger.condensed["by_tokens"] == 1


# Presplit


def test_presplit_takes_the_rows_own_thoughts():
    trace = presplit_trace(["a", "b", "c", "d", "e"])
    one = reply("7", reasoning=trace.text, trace=trace, reasoning_path=("r",))
    done = condenser(segmenter="presplit")(chat(USER, one))
    assert done.messages[1].trace == Trace(("a\n\n", "b\n\n", "e"), (0, 1, 4), 5)
    with pytest.raises(RowError, match="presplit"):
        condenser(segmenter="presplit")(chat(USER, think()))


# Answers


def with_box(at, solution=""):
    thoughts = [*TEN]
    thoughts[at] = f"thus \\boxed{{7}} in {at}"
    return chat(USER, think("\n\n".join(thoughts), solution))


@pytest.mark.parametrize("strategy", ["head", "middle", "random"])
def test_the_last_thought_stays_when_nothing_follows_the_trace(strategy):
    for tau in (0.1, 0.2, 0.5):
        done = condenser(strategy=strategy, tau=tau)(chat(USER, think(solution=" \n")))
        assert done.messages[1].trace.origin[-1] == 9
        assert len(done.messages[1].trace.origin) == max(int(tau * 10), 2)
        spoken = condenser(strategy=strategy, tau=tau)(chat(USER, think()))
        assert strategy == "random" or spoken.messages[1].trace.origin[-1] < 9


def test_protect_last_counts_thoughts():
    done = condenser(strategy="head", tau=0.5, protect_last=3)(chat(USER, think(solution="")))
    assert done.messages[1].trace.origin == (0, 1, 7, 8, 9)


@pytest.mark.parametrize("at", range(10))
def test_a_lost_answer_comes_back_with_the_shortest_end_that_has_it(at):
    one = condenser(strategy="epic", tau=0.4)  # keeps 0 1 8 9
    done = one(with_box(at))
    lost = 2 <= at < 8
    assert done.messages[1].trace.origin == ((0, 1, *range(at, 10)) if lost else (0, 1, 8, 9))
    assert one.ledger.answers["lost"] == lost
    assert one.ledger.answers["lost, repaired by a longer end"] == lost
    assert one.ledger.answers["in the trace alone"] == 1


def test_other_rules_for_a_lost_answer():
    full = condenser(on_answer_lost="keep_full")
    done = full(with_box(5))
    assert done.messages[1].content == with_box(5).messages[1].content
    assert done.messages[1].trace.origin == tuple(range(10))
    assert full.ledger.rows == {"unchanged: no shorter trace keeps the answer": 1}
    drop = condenser(on_answer_lost="drop")
    assert drop(with_box(5)) is None
    assert drop.ledger.rows == {"dropped: final answer lost": 1}
    assert drop(with_box(9)) is not None


def test_an_answer_in_the_solution_needs_no_repair():
    one = condenser()
    done = one(with_box(5, solution="\\boxed{7}"))
    assert done.messages[1].trace.origin == (0, 1, 2, 8, 9)
    assert one.ledger.answers == {"kept by the solution, or none stated": 1}


def test_the_rows_answer_is_looked_for_as_a_plain_number():
    thoughts = [f"a thought without digits, {name}" for name in ("one", "two", "three", "four", "five", "six")]
    thoughts[2] = "so there are 42 of them"
    conversation = replace(chat(USER, think("\n\n".join(thoughts), "That is it.")), answer="42")
    assert condenser()(conversation).messages[1].trace.origin == (0, 1, 2, 3, 4, 5)
    assert condenser()(replace(conversation, answer=None)).messages[1].trace.origin == (0, 1, 5)


def test_the_rows_answer_belongs_to_the_last_turn():
    thoughts = [f"a thought without digits, {name}" for name in ("one", "two", "three", "four", "five", "six")]
    thoughts[2] = "so there are 42 of them"
    turn = think("\n\n".join(thoughts), "That is it.")
    done = condenser()(chat(USER, turn, USER, turn, answer="42"))
    assert [m.trace.origin for m in done.messages if m.trace] == [(0, 1, 5), (0, 1, 2, 3, 4, 5)]


def test_token_pruning_restores_whole_thoughts_at_the_end():
    def scorer(prefix, text):
        return [(i, i + 1, 1.0 if i < 10 else 0.0) for i in range(len(text))]

    one = Condenser(CondenseConfig(strategy="token", tau=0.1, min_tokens=0), words, scorer=scorer)
    done = one(with_box(7))
    assert done.messages[1].trace.text.endswith("thus \\boxed{7} in 7\n\n" + "\n\n".join(TEN[8:]))
    assert one.ledger.answers["lost, repaired by a longer end"] == 1


# Turns


def test_every_trained_turn_is_condensed_and_history_stays_by_default():
    old = replace(think(), trained=False)
    done = condenser()(chat(USER, old, USER, think(), USER, think()))
    assert done.messages[1] == old
    assert [len(m.trace.origin) for m in done.messages if m.trace] == [5, 5]


def test_history_can_be_stripped():
    field = Message("assistant", "7", reasoning=TRACE, trained=False)
    marked = replace(think(solution="\n\n7"), trained=False)
    one = condenser(history="strip")
    done = one(chat(USER, field, USER, marked, USER, think()))
    assert [(m.content, m.reasoning) for m in done.messages[1:4:2]] == [("7", None)] * 2
    assert done.messages[5].trace is not None
    assert one.ledger.turns["earlier turn, thinking stripped"] == 2


def test_a_turn_before_a_tool_result_stays_whole():
    one = condenser()
    before = chat(USER, think(), Message("tool", "3"), think())
    done = one(before)
    assert done.messages[1].content == before.messages[1].content
    assert done.messages[1].trace.origin == tuple(range(10))
    assert done.messages[3].trace.origin == (0, 1, 2, 8, 9)
    assert one.ledger.turns == {"a tool result follows": 1, "condensed": 1}


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, r"tau is 0.0.*\(0, 1\]"),
        ({"tau": 1.01}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": "0.5"}, "tau"),
        ({"tau": True}, "tau"),
        ({"rho": -0.1}, r"rho is -0.1.*\[0, 1\]"),
        ({"rho": 1.5}, "rho"),
        ({"strategy": "epik"}, "did you mean 'epic'"),
        ({"segmenter": "paragraf"}, "did you mean 'paragraph'"),
        ({"budget": "token"}, "did you mean 'tokens'"),
        ({"on_answer_lost": "extend"}, "did you mean 'extend_tail'"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"protect_last": 0.5}, "protect_last"),
        ({"segmenter": "regex"}, "both or neither"),
        ({"pattern": "x"}, "both or neither"),
        ({"segmenter": "regex", "pattern": "("}, "no regular expression"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        condenser(**settings)


# Fit to length


def measure(conversation):
    return sum(words(m.content) + words(m.reasoning or "") for m in conversation.messages)


@pytest.mark.parametrize("strategy", ["full", *BY_THOUGHT])
@given(limit=st.integers(1, 70))
def test_fit_keeps_as_much_as_fits(strategy, limit):
    one = condenser(strategy=strategy, tau=1.0)
    whole = one(chat(USER, think()))
    done = one.fit(whole, limit, measure)
    # Around the ten thoughts of five words: three words of prompt, <think>, and three of </think> and solution.
    least = 7 + 5 * (2 if strategy in ("full", "epic") else 1)
    if limit < least:
        assert done is None
    else:
        assert measure(done) <= limit
        assert len(done.messages[1].trace.origin) == 10 or measure(done) + 5 > limit


def test_fit_goes_on_from_a_condensed_trace():
    for strategy in BY_THOUGHT:
        one = condenser(strategy=strategy, tau=0.6)
        done = one(chat(USER, think()))
        further = one.fit(done, measure(done) - 1, measure)
        direct = condenser(strategy=strategy, tau=0.5)(chat(USER, think()))
        assert further.messages == direct.messages
        assert one.ledger.fit == {"condensed further": 1}
        assert one.ledger.tokens_after["trace"] == 25 and one.ledger.thoughts["after"] == 5


def test_fit_leaves_what_fits_and_says_what_cannot():
    one = condenser()
    done = one(chat(USER, think()))
    assert one.fit(done, measure(done), measure) is done
    assert one.fit(done, 5, measure) is None
    assert one.fit(chat(USER, reply("plain text")), 1, measure) is None
    assert one.ledger.fit == {"impossible": 2}


def test_fit_protects_the_answer():
    whole = condenser(strategy="full")(with_box(6))
    done = condenser(strategy="full").fit(whole, 40, measure)
    assert "boxed" in done.messages[1].content and measure(done) <= 40


def test_fit_shares_the_cut_among_turns():
    one = condenser(strategy="full")
    whole = one(chat(USER, think(), USER, think("\n\n".join(TEN[:5]))))
    done = one.fit(whole, measure(whole) - 30, measure)
    assert [len(m.trace.origin) for m in done.messages if m.trace] == [6, 3]


def test_fit_leaves_turns_before_a_tool_result():
    one = condenser(strategy="full")
    whole = one(chat(USER, think(), Message("tool", "3"), think()))
    done = one.fit(whole, measure(whole) - 30, measure)
    assert [len(m.trace.origin) for m in done.messages if m.trace] == [10, 4]


# Truncation


def test_truncate_cuts_the_whole_row_and_marks_the_turn():
    one = condenser(strategy="truncate", tau=0.5)
    before = chat(USER, think("\n" + TRACE, "It is 7."))
    total = measure(before)
    done = one(before)
    last = done.messages[1]
    assert last.truncated and before.messages[1].content.startswith(last.content)
    assert measure(done) == -(-total // 2)
    assert last.content.endswith(last.trace.text) and last.trace.total == 10
    assert one.ledger.rows == {"truncated": 1}
    assert one.ledger.tokens_after["solution"] <= 1  # the marker that sticks to the first word


def test_truncate_in_the_solution_keeps_the_trace():
    done = condenser(strategy="truncate", tau=0.9)(chat(USER, think(solution=" one two three four five" * 4)))
    assert done.messages[1].trace.origin == tuple(range(10))
    assert done.messages[1].truncated and "</think> one" in done.messages[1].content


def test_truncate_over_several_turns():
    first, second = think(solution=" a b c"), think()
    before = chat(USER, first, USER, second)
    half = condenser(strategy="truncate", tau=0.5)(before)
    assert len(half.messages) == 2 and not half.messages[1].truncated  # the cut falls on the second question
    assert condenser(strategy="truncate", tau=0.3)(before).messages[1].truncated
    more = condenser(strategy="truncate", tau=0.9)(before)
    assert [m.truncated for m in more.messages] == [False, False, False, True]


def test_truncate_drops_rows_of_which_no_answer_is_left():
    one = condenser(strategy="truncate", tau=0.1)
    assert one(chat(replace(USER, content="why " * 500), think())) is None
    assert one(chat(Message("system", "be brief"), replace(USER, content="why " * 500), think())) is None
    assert one.ledger.rows == {"dropped: nothing trained before the cut": 2}


def test_truncate_in_a_reasoning_field():
    before = chat(USER, reply("It is 7.", reasoning=TRACE, reasoning_path=("r",)))
    cut = condenser(strategy="truncate", tau=0.5)(before).messages[1]
    assert cut.content == "" and TRACE.startswith(cut.reasoning) and cut.truncated
    assert cut.trace.text == cut.reasoning
    late = condenser(strategy="truncate", tau=0.97)(before).messages[1]
    assert late.reasoning == TRACE and late.content == "It is " and late.truncated


@given(st.floats(0.01, 1.0), st.integers(0, 3))
def test_truncate_keeps_a_prefix_of_the_tokens(tau, earlier):
    before = chat(*[m for _ in range(earlier) for m in (USER, think())], USER, think())
    done = condenser(strategy="truncate", tau=tau)(before)
    if done is None:
        return
    assert measure(done) <= -(-int(tau * 1e6) * measure(before) // 1_000_000) + 1
    assert all(a == b or b.truncated for a, b in zip(before.messages, map(untraced, done.messages), strict=False))


def untraced(message):
    return replace(message, trace=None)


# Ledger


def test_ledger_by_hand():
    one = condenser()
    one(chat(USER, think()))
    one(chat(USER, reply("no trace here")))
    one(chat(USER, reply("<think>never closed")))
    figures = one.ledger.to_dict()
    assert figures["rows"] == {
        "condensed": 1, "dropped: trace without a closing marker": 1, "unchanged: no trace": 1,
    }  # fmt: skip
    assert figures["thoughts"] == {"after": 5, "before": 10, "traces": 1}
    # Prompts 3 + 3, solutions "<think></think>It is 7." 3 and "no trace here" 3.
    assert figures["tokens_before"] == {"prompt": 6, "solution": 6, "trace": 50}
    assert figures["tokens_after"] == {"prompt": 6, "solution": 6, "trace": 25}
    assert (figures["mean_thoughts"], figures["mean_tokens_per_thought"]) == (10.0, 5.0)
    assert (figures["thought_ratio"], figures["token_ratio"]) == (0.5, 0.5)
    assert figures["predicted_time_saved"] == round(25 / 62, 4)
    assert json.loads(json.dumps(figures)) == figures
    text = one.ledger.summary()
    for part in ("1  condensed", "10 -> 5", "40.3%", "dropped: trace without"):
        assert part in text


def test_ledgers_add_up():
    rows = [chat(USER, think()), chat(USER, reply("plain")), with_box(4), chat(USER, reply("<think>open"))]
    together = condenser()
    apart = Ledger()
    for conversation in rows:
        together(conversation)
        one = condenser()
        one(conversation)
        assert apart.merge(one.ledger) is apart
    assert apart.to_dict() == together.ledger.to_dict()


def test_an_empty_ledger_divides_by_nothing():
    figures = Ledger().to_dict()
    assert figures["predicted_time_saved"] == 0 and figures["token_ratio"] is None
    assert "rows  0" in Ledger().summary()


def test_rows_are_named_by_their_changed_turn():
    ledger = Ledger()
    ledger.kept((0, 0), [TurnRecord("condensed", (3, 2), (9, 6)), TurnRecord("no trace")])
    ledger.kept((0, 0), [TurnRecord("no trace"), TurnRecord("too few thoughts")])
    assert ledger.rows == {"condensed": 1, "unchanged: too few thoughts": 1}
    assert "trained turns  4" in ledger.summary()
