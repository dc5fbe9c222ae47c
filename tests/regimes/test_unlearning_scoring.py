"""The scorer by hand, row by row; and what the regime asks of a model without one being there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_reason.data.prompts import EvalPrompt
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.data.unlearning.pairs import RoleRows
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.regimes.unlearn.losses import KL, NPO, RMU
from lit_reason.regimes.unlearn.reference import Reference
from lit_reason.regimes.unlearn.regime import UnlearnRegime
from lit_reason.regimes.unlearn.scoring import Scorer
from lit_reason.rollout.sampler import Completion

# By id: role, group, what would be said from memory.
ROWS = {
    "f0sc1": (Role.FORGET, "forget_task1_regurgitation", "one two three four"),
    "f0qa0": (Role.FORGET, "forget_task1_knowledge", "Ann"),
    "r0sc1": (Role.RETAIN, "retain_task1_regurgitation", "five six"),
    "r0qa0": (Role.RETAIN, "retain_task1_knowledge", "Ben"),
}


def scorer() -> Scorer:
    texts = {
        name: SimpleNamespace(row_id=name, role=role, group=group, kind=group.rpartition("_")[2], answer=answer)
        for name, (role, group, answer) in ROWS.items()
    }
    choices = {f"q{i}#{k}": (f"q{i}", k == 1) for i in range(2) for k in range(2)}
    files = {Role.MEMBER: "members.jsonl", Role.NONMEMBER: "nonmembers.jsonl"}
    groups = [group for _, group, _ in ROWS.values()]
    return Scorer(SimpleNamespace(groups=groups, choices=choices, texts=texts, files=files))


def row(name: str, *, end: bool) -> TokenRow:
    """A token that is seen and two that are trained, the last of them the end of an answer."""
    segment = [Segment.PROMPT, Segment.SOLUTION, Segment.END if end else Segment.SOLUTION]
    weight, decile = np.array([0, 1, 1], np.float32), np.full(3, -1, np.int8)
    return TokenRow(np.zeros(3, np.int32), weight, np.array(segment, np.uint8), decile, name)


# Log-probabilities and hits of the two trained tokens of each row, in the order of roles.
PASS = [
    ("f0sc1", Role.FORGET, True, (-1.0, -3.0), (1, 0)),  # all of the text is known, its end is not
    ("f0qa0", Role.FORGET, True, (-1.0, -1.0), (1, 0)),  # the answer would go on
    ("book#0", Role.FORGET, False, (-8.0, -8.0), (0, 0)),  # a stretch of a document has a loss and no score
    ("r0sc1", Role.RETAIN, True, (-2.0, -2.0), (0, 1)),
    ("r0qa0", Role.RETAIN, True, (-0.1, -0.3), (1, 1)),
    ("m0", Role.MEMBER, False, (-0.5, -0.5), (1, 1)),
    ("n0", Role.NONMEMBER, False, (-1.0, -1.0), (1, 1)),
    ("q0#0", Role.CHOICE, False, (-2.0, -2.0), (0, 0)),
    ("q0#1", Role.CHOICE, False, (-1.0, -1.0), (0, 0)),
    ("q1#0", Role.CHOICE, False, (-1.0, -1.0), (0, 0)),
    ("q1#1", Role.CHOICE, False, (-2.0, -2.0), (0, 0)),
]


def test_rows_are_scored_token_by_token():
    store = RoleRows([row(name, end=end) for name, _, end, _, _ in PASS], [role for _, role, *_ in PASS])
    logp, hit = (torch.tensor([value for line in PASS for value in line[i]]).float() for i in (3, 4))
    of = scorer()
    of.add_pack(store.pack(range(len(PASS)), *store.totals(range(len(PASS)))), logp, hit.bool())
    of.add_pack(store.pack([0], {}, {}, stand_in=True), torch.zeros(0), torch.zeros(0).bool())  # counts for nothing
    assert of.scores().scores == {
        "forget_task1_regurgitation": 1.0,
        "forget_task1_knowledge": 0.0,
        "retain_task1_regurgitation": 0.0,
        "retain_task1_knowledge": 1.0,
    }
    assert of.figures() == pytest.approx({"forget_loss": (2.0 + 1.0 + 8.0) / 3, "retain_loss": (2.0 + 0.2) / 2})
    assert (of.scores().auc, of.scores().utility, of.scores().utility_of) == (1.0, 0.5, "2 questions, not MMLU")
    assert of.scores(0.4).utility == 0.4 and of.scores(0.4).utility_of == "MMLU" and not of.scores().official


def test_texts_are_scored_by_their_kind_and_broken_ones_counted():
    written = {"f0sc1": " one two!", "f0qa0": " ", "r0sc1": "six " * 20, "r0qa0": " ben"}
    ids = {"f0sc1": [5, 6, 1], "f0qa0": [1], "r0sc1": [7] * 20, "r0qa0": [8] * 15 + [1]}
    prompts = [EvalPrompt([0], name, "") for name in written]
    completions = [Completion(i, 0, ids[name], "", ids[name][-1] == 1) for i, name in enumerate(written)]
    of = scorer()
    of.add_texts(prompts, completions, list(written.values()))
    found = of.scores()
    assert found.scores == {
        "forget_task1_regurgitation": 0.5,
        "forget_task1_knowledge": 0.0,
        "retain_task1_regurgitation": 0.5,
        "retain_task1_knowledge": 1.0,
    }
    assert found.broken == {"forget": 0.5, "retain": 0.5} and found.official


# ---- the regime ----


@pytest.mark.parametrize(
    ("adapter", "fresh"),
    [
        (AdapterConfig(rank=2), True),
        (AdapterConfig(rank=2, train_rest=True), False),
        (AdapterConfig(folder="adapter"), False),
        (None, False),
    ],
)
def test_the_model_without_its_adapter_is_the_one_before_only_where_the_adapter_is_new(adapter, fresh):
    lm = ModelConfig(path="model", adapter=adapter)
    assert Reference("auto", NPO(), lm).copy is not fresh and Reference("copy", NPO(), lm).copy
    if fresh:
        assert not Reference("adapter_off", NPO(), lm).copy
    else:
        with pytest.raises(UserError, match=r"only where lm\.adapter is new"):
            Reference("adapter_off", NPO(), lm)


def test_numbers_are_cached_for_losses_of_sums_alone():
    lm = ModelConfig(path="model")
    assert Reference("cached", NPO(), lm).cached and not Reference("auto", NPO(), lm).cached
    for loss in (KL(), NPO(retain="kl"), RMU()):
        with pytest.raises(UserError, match=f"{type(loss).__name__} needs more"):
            Reference("cached", loss, lm)


@pytest.mark.parametrize(
    ("layers", "layer", "asked"), [(None, 7, ([5, 6, 7], 7)), (None, 1, ([0, 1], 1)), ([3], 7, ([3], 7))]
)
def test_rmu_trains_the_layer_that_is_read_and_two_below(layers, layer, asked):
    found = []
    lm = SimpleNamespace(train_layers=lambda *given: found.append(given))
    UnlearnRegime(ModelConfig(path="model"), RMU(layer=layer), layers=layers).spread(lm)
    assert found == [asked]


def test_one_bad_micro_batch_spoils_the_step():
    regime = SimpleNamespace(_finite=None, micro_batches=2, step_meter=SimpleNamespace(update=lambda *_: None))
    for loss in (float("nan"), 1.0):
        UnlearnRegime._record(regime, SimpleNamespace(), torch.tensor(loss))
    assert not regime._finite
