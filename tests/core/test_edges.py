"""Which part of a trace carries the answer: the cut, the score, and the table."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_reason.core import edges
from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.conversation import Trace
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.rendering.render import Renderer
from lit_reason.errors import RowError, UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.tasks import chain
from lit_reason.tasks.student import StudentConfig, build_tokenizer, write_student

TASK = chain.ChainConfig()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(chain.words(TASK))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = write_student(tmp_path_factory.mktemp("student"), chain.words(TASK), StudentConfig(width=32))
    return LanguageModel.load(ModelConfig(path=str(folder))).eval()


def conversation(index: int = 0, **changes):
    record = chain.record(TASK, 0, index, held_out=False) | changes
    condenser = Condenser(CondenseConfig(min_tokens=0, min_chars=1), lambda text: len(text.split()))
    return condenser(to_conversation(record, f"row:{index}", train_on="last"))


def row(tokenizer, index: int = 0, **changes) -> edges.EdgeRow:
    return edges.edge_row(conversation(index, **changes), Renderer(tokenizer, RenderConfig()))


def whole(n: int) -> Trace:
    return Trace(tuple(f"{i}." for i in range(n)), tuple(range(n)), n)


@pytest.mark.parametrize("n", range(3, 13))
def test_thirds_are_the_trace_again_and_as_even_as_can_be(n):
    parts = edges.thirds(whole(n))
    assert parts.text == whole(n).text
    assert (parts.origin, parts.total) == ((0, 1, 2), 3)
    head, middle, tail = (part.count(".") for part in parts.thoughts)
    assert head == tail == round(n / 3)
    assert abs(middle - head) <= 1


def test_thirds_refuse_what_has_none():
    with pytest.raises(RowError, match="fewer than three thoughts"):
        edges.thirds(whole(2))
    with pytest.raises(RowError, match="condensed trace"):
        edges.thirds(Trace(("a", "b", "c"), (0, 1, 5), 6))


def test_tokens_know_their_part(tokenizer):
    turn = conversation().messages[-1]
    found = row(tokenizer)
    texts = [tokenizer.decode(found.ids[found.part == part]) for part in range(4)]
    assert tuple(texts[:3]) == edges.thirds(turn.trace).thoughts
    assert "<think>" + "".join(texts[:3]) + "</think>" + texts[3] == turn.content
    assert tokenizer.decode(found.ids[found.part < 0]).replace(" ", "").endswith("<think></think><|end|>")


def test_only_the_last_trained_turn_counts(tokenizer):
    first, second = (chain.record(TASK, 0, index, held_out=False)["messages"] for index in (0, 1))
    found = row(tokenizer, messages=first + second)
    assert tokenizer.decode(found.ids[found.part == 3]) == second[1]["content"].partition("</think>")[2]
    assert found.part[: len(row(tokenizer).ids)].max() == -1
    assert (found.part >= 0).sum() == (row(tokenizer, 1).part >= 0).sum()


def test_rows_that_cannot_be_used_say_why(tokenizer):
    user = {"role": "user", "content": "given a0"}
    for content, reason in {
        " 3": "no trace",
        "<think>so a 0.</think> 0": "fewer than three",
        "<think>so a 0.\n\nso a 0.\n\nso a 0.</think>": "no solution",
    }.items():
        with pytest.raises(RowError, match=reason):
            row(tokenizer, messages=[user, {"role": "assistant", "content": content}])


def test_given_rows_leave_out_thirds_and_nothing_else(tokenizer):
    found = row(tokenizer)
    versions = edges.given_rows(found)
    head, middle, tail = edges.thirds(conversation().messages[-1].trace).thoughts
    before, after = tokenizer.decode(found.ids).split(head + middle + tail)
    texts = ["", head, middle, tail, head + middle + tail]
    assert [tokenizer.decode(v.ids) for v in versions] == [before + text + after for text in texts]
    for version in versions:
        assert version.ids[version.weight > 0].tolist() == found.ids[found.part == 3].tolist()


def test_scores_are_the_models_own_row_by_row(tokenizer, student):
    """Packed with others or alone through transformers: the same losses and the same states."""
    rows = [row(tokenizer, index) for index in range(3)]
    for found, one in zip(edges.measure(student, rows), rows, strict=True):
        assert found.row_id == one.row_id
        assert found.tokens == tuple((one.part == part).sum() for part in range(4))
        for version, nll in zip(edges.given_rows(one), found.nll, strict=True):
            ids = torch.tensor(version.ids[None].astype(np.int64))
            with torch.no_grad():
                out = student.hf(ids, output_hidden_states=True)
            at = np.flatnonzero(version.weight)
            logp = out.logits[0].double().log_softmax(-1)
            assert nll == pytest.approx(-sum(float(logp[t - 1, version.ids[t]]) for t in at), rel=1e-5)
        states = out.hidden_states[-1][0].double()  # of the last version, the whole trace
        want = torch.stack([states[torch.from_numpy(one.part == part)].mean(0) for part in range(4)])
        torch.testing.assert_close(found.pooled_PD, want, rtol=1e-4, atol=1e-5)


def counting_student(size: int) -> SimpleNamespace:
    """Predicts each token in proportion to how often it stood in this document before, plus one."""

    def hidden(ids, positions, cu_seqlens):
        documents = torch.split(torch.nn.functional.one_hot(ids, size).double(), cu_seqlens.diff().tolist())
        return torch.cat([document.cumsum(0) for document in documents])

    def head(hidden_SD, targets, weights):
        logp = (hidden_SD.gather(1, targets[:, None])[:, 0] + 1).log() - (hidden_SD.sum(1) + size).log()
        return SimpleNamespace(logp_S=logp)

    return SimpleNamespace(hidden=hidden, head=head, device=torch.device("cpu"))


def test_a_student_that_counts_finds_the_part_that_names_the_answer(tokenizer):
    """The answer ` 8` stands twice in the middle and nowhere else; every count can be made by hand."""
    trace = ["so a 0.", "so 8 8.", "so b 1."]
    content = "<think>" + "\n\n".join(trace) + "</think> 8"
    turns = [{"role": "user", "content": "given a0"}, {"role": "assistant", "content": content}]
    found = row(tokenizer, messages=turns)
    other = row(tokenizer, 1)
    size = len(tokenizer)
    measured = edges.measure(counting_student(size), [other, found])[1]
    bare = len(tokenizer("<|user|>given a0<|end|><|assistant|><think></think>")["input_ids"])
    head, middle, tail = 5, 5, 4  # so, a, 0, ., blank line; the tail has no blank line
    want = [
        math.log(size + bare),
        math.log(size + bare + head),
        math.log(size + bare + middle) - math.log(3),
        math.log(size + bare + tail),
        math.log(size + bare + head + middle + tail) - math.log(3),
    ]
    assert measured.nll == pytest.approx(tuple(want))
    assert measured.tokens == (head, middle, tail, 1)


def made_up(n: int, seed: int = 0) -> list[edges.TraceEdges]:
    """Traces whose solution state is the tail's, turned, and whose loss the tail takes away but for a tenth."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n):
        parts = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        parts[3] = parts[2].flip(0)
        size = 1 + index % 3
        found.append(edges.TraceEdges(f"r:{index}", (4, 5, 6, size), (2.0 * size, 2.0 * size, 1.5, 0.2, 0.0), parts))
    return found


def test_report_by_hand():
    found = edges.report(made_up(90))
    assert (found.traces, found.solution_tokens, found.nll_prompt) == (90, 2.0, 2.0)
    parts = found.parts
    assert list(parts) == ["head", "middle", "tail", "all"]
    assert [p.tokens for p in parts.values()] == [4.0, 5.0, 6.0, 15.0]
    assert [p.drop for p in parts.values()] == pytest.approx([0.0, 2 - 1.5 / 2, 2 - 0.2 / 2, 2.0])
    assert [p.nll for p in parts.values()] == pytest.approx([2 - p.drop for p in parts.values()])
    for p in parts.values():
        assert p.drop_low <= p.drop + 1e-9 and p.drop - 1e-9 <= p.drop_high
    assert parts["head"].drop_low == parts["head"].drop_high == 0.0
    assert 0.05 < parts["middle"].drop_high - parts["middle"].drop_low < 0.3
    assert parts["tail"].hsic_normalised == pytest.approx(1.0)
    assert abs(parts["head"].hsic_normalised) < 0.1 > abs(parts["middle"].hsic_normalised)
    assert parts["all"].hsic is None


def test_report_does_not_depend_on_the_order_of_the_traces():
    found = made_up(12)
    assert edges.report(found) == edges.report(found[::-1])
    assert edges.report(found).to_dict()["parts"]["tail"]["tokens"] == 6.0


def test_report_needs_four_traces():
    with pytest.raises(UserError, match="3 usable traces"):
        edges.report(made_up(3))


def test_batches_hold_every_row_once_and_make_room_for_a_long_one(tokenizer):
    rows = [row(tokenizer, index) for index in range(6)]
    sizes = [sum(len(version) for version in edges.given_rows(one)) for one in rows]
    for room in (1, 2 * max(sizes)):
        chosen = edges.batches(rows, room)
        assert sorted(i for batch in chosen for i in batch) == list(range(6))
        assert all(sum(sizes[i] for i in batch) <= max(room, *sizes) for batch in chosen)
