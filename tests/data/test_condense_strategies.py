"""Each strategy on a trace small enough to condense by hand, and what all of them promise on any trace."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.condensation.markers import split_trace
from lit_reason.data.condensation.selection import BY_THOUGHT
from lit_reason.data.condensation.thoughts import segment
from lit_reason.data.config import CondenseConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.errors import UserError

A, B, C, D, E = (f"thought number {name}" for name in ("one", "two", "three", "four", "five"))
GAP = "\n\n"
FIVE = "\n" + GAP.join((A, B, C, D, E)) + "\n"


def words(text):
    return len(text.split())


def row(trace, *, solution="So it is 7.", question="What is it?", answer=None, row_id="rows.jsonl:1"):
    reply = Message("assistant", f"<think>{trace}</think>{solution}", trained=True, content_path=("a",))
    return Conversation((Message("user", question), reply), row_id, answer=answer)


def condense(conversation, *, scorer=None, teacher=None, **settings):
    condenser = Condenser(
        CondenseConfig(**{"strategy": "epic", "min_tokens": 0, **settings}), words, scorer=scorer, teacher=teacher
    )
    return condenser(conversation), condenser.ledger


def body(conversation):
    return split_trace(conversation.messages[-1].content).body


@pytest.mark.parametrize(
    ("settings", "kept", "origin"),
    [
        ({"strategy": "epic"}, (A, B, E), (0, 1, 4)),  # k = ceil(2.5) = 3, t = 1, h = 2
        ({"strategy": "epic", "tau": 0.8}, (A, B, D, E), (0, 1, 3, 4)),
        ({"strategy": "epic", "tau": 0.01}, (A, E), (0, 4)),
        ({"strategy": "epic", "rho": 0.0}, (A, B, C), (0, 1, 2)),
        ({"strategy": "epic", "rho": 1.0}, (C, D, E), (2, 3, 4)),
        ({"strategy": "epic", "rho": 0.67}, (A, D, E), (0, 3, 4)),
        ({"strategy": "head"}, (A, B, C), (0, 1, 2)),
        ({"strategy": "tail"}, (C, D, E), (2, 3, 4)),
        ({"strategy": "tail", "tau": 0.2}, (E,), (4,)),
        ({"strategy": "middle"}, (B, C, D), (1, 2, 3)),
    ],
)
def test_thoughts_that_stay(settings, kept, origin):
    done, ledger = condense(row(FIVE), **settings)
    trace = done.messages[1].trace
    assert (trace.origin, trace.total) == (origin, 5)
    assert body(done) == "\n" + GAP.join(kept) + "\n"
    assert done.messages[1].content == f"<think>{trace.text}</think>So it is 7."
    assert ledger.rows == {"condensed": 1}


@pytest.mark.parametrize(
    ("settings", "origin"),
    [
        ({"strategy": "epic"}, (0, 4)),  # three words each: 7.5 of 15 words hold two thoughts
        ({"strategy": "epic", "tau": 0.6}, (0, 1, 4)),
        ({"strategy": "epic", "tau": 0.6, "rho": 0.67}, (0, 3, 4)),
        ({"strategy": "epic", "tau": 0.01}, (0, 4)),
        ({"strategy": "head", "tau": 0.59}, (0, 1)),
        ({"strategy": "head", "tau": 0.01}, (0,)),
        ({"strategy": "tail", "tau": 0.8}, (1, 2, 3, 4)),
        ({"strategy": "middle", "tau": 0.6}, (1, 2, 3)),
    ],
)
def test_thoughts_that_stay_within_a_token_budget(settings, origin):
    done, ledger = condense(row(FIVE), budget="tokens", **settings)
    assert done.messages[1].trace.origin == origin
    assert ledger.tokens_after["trace"] == 3 * len(origin)


def test_random_is_drawn_by_row_and_keeps_the_order():
    picks = set()
    for number in range(20):
        done, _ = condense(row(FIVE, row_id=f"r:{number}"), strategy="random")
        origin = done.messages[1].trace.origin
        assert len(origin) == 3 and list(origin) == sorted(origin)
        assert done == condense(row(FIVE, row_id=f"r:{number}"), strategy="random")[0]
        picks.add(origin)
    assert len(picks) > 4


@pytest.mark.parametrize("strategy", ["full", *BY_THOUGHT])
def test_full_and_tau_one_change_nothing(strategy):
    before = row(FIVE)
    done, ledger = condense(before, strategy=strategy, tau=0.5 if strategy == "full" else 1.0)
    assert done.messages[1].content == before.messages[1].content
    assert done.messages[1].trace == Trace(tuple(segment(FIVE)), (0, 1, 2, 3, 4), 5)
    assert ledger.tokens_before == ledger.tokens_after


def test_white_space_beside_the_markers_stays():
    # Generation prompts end in "<think>\n": a trace without its first thought must begin like the others.
    for strategy in BY_THOUGHT:
        text = body(condense(row(FIVE), strategy=strategy)[0])
        assert text.startswith("\nthought") and text[-2:] not in ("\n\n", "e\n\n") and text.endswith("\n")
    tight = FIVE.strip()
    assert body(condense(row(tight), strategy="head")[0]) == GAP.join((A, B, C))


def test_a_bridge_stands_at_the_seam():
    done, ledger = condense(row(FIVE), bridge="[...] ")
    assert body(done) == f"\n{A}{GAP}{B}{GAP}[...] {E}\n"
    assert done.messages[1].trace.seams == (2,)
    assert ledger.tokens_after["trace"] == 10  # nine words of thoughts and the bridge


def test_token_keeps_what_the_model_did_not_expect():
    def scorer(prefix, text):
        assert prefix == "What is it?\n\n<think>"
        surprise = {"one": 9.0, "four": 8.0, "number": 1.0, "thought": 0.5}
        spans, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            spans.append((start, at, surprise.get(word, 2.0)))
        return spans

    done, ledger = condense(row(FIVE), strategy="token", tau=0.2, scorer=scorer)
    # 15 tokens, 3 stay: "one", "four" and, of three with 2.0, the first: "two".
    assert body(done) == f"one{GAP}two{GAP}four{GAP}"
    assert done.messages[1].trace == Trace((f"one{GAP}", f"two{GAP}", f"four{GAP}"), (0, 1, 3), 5)
    assert ledger.tokens_after["trace"] == 3


def test_regenerate_takes_the_teachers_trace():
    asked = []

    def teacher(question, trace, target):
        asked.append((question, trace, target))
        return "  a much shorter trace\n\nthan the one before "

    done, ledger = condense(row(FIVE), strategy="regenerate", teacher=teacher)
    assert asked == [("What is it?", FIVE.strip(), 8)]  # ceil(0.5 * 15)
    assert body(done) == "\na much shorter trace\n\nthan the one before\n"
    assert done.messages[1].trace.origin == (0, 1)
    assert (ledger.tokens_before["trace"], ledger.tokens_after["trace"]) == (15, 8)


@pytest.mark.parametrize("text", ["", "  ", FIVE])
def test_a_rewrite_that_is_no_shorter_is_not_used(text):
    before = row(FIVE)
    done, ledger = condense(before, strategy="regenerate", teacher=lambda q, t, n: text)
    assert done.messages[1].content == before.messages[1].content
    assert ledger.rows == {"unchanged: no shorter trace keeps the answer": 1}


@pytest.mark.parametrize("rule", ["extend_tail", "keep_full", "drop"])
def test_a_rewrite_that_loses_the_answer_is_not_used(rule):
    before = row(FIVE + "\\boxed{7}", solution="")
    done, ledger = condense(before, strategy="regenerate", teacher=lambda q, t, n: "gone", on_answer_lost=rule)
    assert (done is None) == (rule == "drop")
    assert done is None or done.messages[1].content == before.messages[1].content
    assert ledger.answers["lost"] == 1


@pytest.mark.parametrize(("strategy", "name"), [("token", "scorer"), ("regenerate", "teacher")])
def test_strategies_that_need_a_model_say_so(strategy, name):
    with pytest.raises(UserError, match=name):
        condense(row(FIVE), strategy=strategy)


THOUGHTS = st.lists(
    st.text(alphabet="abc \n$`.?W", min_size=20, max_size=40).map(str.strip).filter(lambda t: len(t) >= 16),
    min_size=1,
    max_size=12,
)
SETTINGS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["full", *BY_THOUGHT]),
        "tau": st.floats(0.01, 1.0),
        "rho": st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0])),
        "budget": st.sampled_from(["thoughts", "tokens"]),
        "segmenter": st.sampled_from(["paragraph", "cue", "paragraph+cue"]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=150)
@given(THOUGHTS, SETTINGS, st.sampled_from(["It is 7.", ""]))
def test_what_stays_is_a_subsequence_of_whole_thoughts(thoughts, chosen, solution):
    text = "\n" + GAP.join(thoughts) + "\n"
    before = row(text, solution=solution)
    done, ledger = condense(before, **chosen)
    trace = done.messages[1].trace
    full = condense(before, strategy="full", segmenter=chosen["segmenter"])[0].messages[1].trace
    assert full.text == text and trace.total == full.total
    assert len(set(trace.origin)) == len(trace.origin) and list(trace.origin) == sorted(trace.origin)
    assert [t.strip() for t in trace.thoughts] == [full.thoughts[i].strip() for i in trace.origin]
    assert done.messages[1].content == f"<think>{trace.text}</think>{solution}"
    assert trace.text[0] == "\n" and trace.text[-1] == "\n"
    assert condense(before, **chosen)[0] == done
    assert ledger.tokens_after["trace"] == words(trace.text)
    if ledger.rows["condensed"] == 0:
        assert done.messages[1].content == before.messages[1].content


@given(st.integers(6, 40), SETTINGS)
def test_condensed_text_reads_as_the_same_thoughts_again(count, chosen):
    thoughts = [f"Wait, this is thought number {i}" for i in range(count)]
    done, _ = condense(row("\n" + GAP.join(thoughts) + "\n"), **chosen)
    trace = done.messages[1].trace
    again = segment(split_trace(done.messages[1].content).body, chosen["segmenter"])
    assert tuple(again) == trace.thoughts


@given(THOUGHTS, SETTINGS)
def test_traces_of_no_more_than_the_smallest_count_are_fixed_points(thoughts, chosen):
    least = 2 if chosen["strategy"] == "epic" and 0 < chosen["rho"] < 1 else 1
    blank = {"segmenter": "regex", "pattern": r"(?<=\S)\n\n"}
    before = row(GAP.join(thought.replace("\n", " ") for thought in thoughts[:least]))
    done, _ = condense(before, **chosen | blank)
    assert done.messages[1].content == before.messages[1].content
