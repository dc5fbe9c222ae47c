"""The benchmark's arithmetic: by hand, against other implementations, and the published table."""

import json
import random

import pytest
import torch
from dist import two_ranks
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC

from lit_reason.metrics.lume import (
    FLOOR,
    UnlearningScores,
    attack_score,
    final_score,
    inverted,
    task_aggregate,
)
from lit_reason.metrics.unlearning import (
    ChoiceAccuracy,
    ExactAnswer,
    LossAttack,
    RegurgitationROUGE,
    RowMeans,
    auc,
    is_exact,
    rouge_l_recall,
    row_key,
)

TASKS = ("task1", "task2", "task3")
GROUPS = [
    f"{side}_{task}_{kind}"
    for side in ("forget", "retain")
    for task in TASKS
    for kind in ("knowledge", "regurgitation")
]

# The challenge's site: entry, final, task aggregate, attack, MMLU.
PUBLISHED = [
    ("GA", 0.394, 0.0, 0.912, 0.269),
    ("GD", 0.243, 0.0, 0.382, 0.348),
    ("KL", 0.395, 0.0, 0.916, 0.269),
    ("NPO", 0.188, 0.021, 0.080, 0.463),
    ("AILS-NTUA", 0.706, 0.827, 0.847, 0.443),
    ("ZJUKLAB", 0.487, 0.944, 0.048, 0.471),
    ("YNU", 0.470, 0.834, 0.139, 0.436),
    ("Mr. Snuffleupagus", 0.376, 0.387, 0.256, 0.485),
    ("Atyaephyra", 0.273, 0.348, 0.014, 0.456),
    ("SHA256", 0.711, 0.964, 0.894, 0.275),
    ("AILS-NTUA, 1B", 0.688, 0.964, 0.857, 0.242),
    ("SHA256, 1B", 0.652, 0.973, 0.741, 0.243),
    ("Atyaephyra, 1B", 0.586, 0.887, 0.622, 0.248),
]


def by_hand(written: str, reference: str) -> float:
    """ROUGE-L recall from the definition: words of letters and digits, stemmed when longer than three letters."""
    from nltk.stem.porter import PorterStemmer

    def words(text: str) -> list[str]:
        cleaned = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
        return [PorterStemmer().stem(w) if len(w) > 3 else w for w in cleaned]

    a, b = words(written), words(reference)
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1] / len(b) if b else 0.0


def rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of all twelve groups, with what a model wrote: right, cut, changed, longer or empty."""
    rng, found = random.Random(seed), []
    text = "the quick foxes jumped over lazy dogs running through 900 12-34 me.com Paris's cities, while others slept"
    vocabulary = text.split()
    for i in range(count):
        reference = " ".join(rng.choices(vocabulary, k=rng.randint(1, 12)))
        words = reference.split()
        written = rng.choice(
            [reference, f" {reference.upper()}\n", reference + " and more", " ".join(words[: len(words) // 2]), "",
             " ".join(rng.sample(words, len(words))), reference.replace("running", "runs")]
        )  # fmt: skip
        found.append({"id": f"row{i}", "group": GROUPS[i % 12], "written": written, "reference": reference})
    return found


def scored(found: list[dict]) -> dict[str, float]:
    rouge, exact = RegurgitationROUGE(GROUPS), ExactAnswer(GROUPS)
    for row in found:
        metric = rouge if row["group"].endswith("regurgitation") else exact
        metric.update([row["id"]], [row["group"]], [row["written"]], [row["reference"]])
    return {**rouge.compute(), **exact.compute()}


# ---- the parts ----


def test_rouge_recall_by_hand():
    assert rouge_l_recall("a x c d e", "a b c d") == 0.75
    assert rouge_l_recall("", "a b") == 0.0
    assert rouge_l_recall("a b and a lot more", "a b") == 1.0  # recall, not F: the text runs on
    assert rouge_l_recall("he walked", "he walks") == 1.0  # stemmed


def test_exact_answer_is_the_whole_generation():
    assert is_exact(" Paris ", "paris")
    assert not is_exact("Paris.", "Paris") and not is_exact("It is Paris", "Paris")


def test_aggregate_by_hand():
    assert task_aggregate([0.5] * 12) == pytest.approx(0.5)
    assert task_aggregate([1.0] * 11 + [0.5]) == pytest.approx(12 / 13)
    assert task_aggregate([1.0] * 11 + [0.0]) == 0.0
    assert task_aggregate([1.0] * 11 + [0.0], FLOOR) == pytest.approx(12 / (11 + 1 / FLOOR))
    for wrong in ([], [0.5, -0.1]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            task_aggregate(wrong)


def test_attack_score_by_hand():
    assert [attack_score(a) for a in (0.5, 1.0, 0.0, 0.75, 0.25)] == [1.0, 0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e[0])
def test_the_published_table_comes_out(entry):
    _, final, aggregate, attack, mmlu = entry
    assert final_score(aggregate, attack, mmlu) == pytest.approx(final, abs=1e-3)


def test_forget_scores_count_the_other_way_round():
    assert inverted({"forget_task1_knowledge": 0.2, "retain_task1_knowledge": 0.2}) == {
        "forget_task1_knowledge": 0.8,
        "retain_task1_knowledge": 0.2,
    }


# ---- the attack ----


def test_auc_of_ties_is_a_half():
    assert auc(torch.ones(5), torch.ones(3)) == 0.5


def test_auc_agrees_with_others_on_random_scores_with_ties():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        positive, negative = (torch.randint(0, 9, (n,), generator=rng).double() for n in (17, 11))
        labels = [1] * 17 + [0] * 11
        scores = torch.cat([positive, negative])
        pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
        found = auc(positive, negative)
        assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert found == pytest.approx(roc_auc_score(labels, scores.numpy()), abs=1e-12)
        assert found == pytest.approx(float(BinaryAUROC()(scores / 9, torch.tensor(labels))), abs=1e-6)


def test_members_have_low_losses():
    attack = LossAttack()
    attack.update(["a", "b"], [0.1, 0.2], member=True)
    assert attack.compute() == {}  # one kind alone tells nothing
    attack.update(["c", "d"], [0.3, 0.15], member=False)
    assert attack.compute() == {"auc": 0.75}


# ---- the scorer ----


def test_the_scorer_agrees_with_an_independent_calculation_on_200_rows():
    found = rows(200)
    expected: dict[str, list[float]] = {}
    for row in found:
        if row["group"].endswith("regurgitation"):
            value = by_hand(row["written"], row["reference"])
        else:
            value = float(row["written"].strip().casefold() == row["reference"].strip().casefold())
        expected.setdefault(row["group"], []).append(value)
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    ours = scored(found)
    assert ours == pytest.approx(means, abs=1e-12) and len(ours) == 12
    turned = [1 - value if name.startswith("forget") else value for name, value in means.items()]
    by_definition = len(turned) / sum(1 / value for value in turned)
    assert UnlearningScores(ours).aggregate == pytest.approx(by_definition, abs=1e-12)
    assert 0.05 < by_definition < 0.95


def test_torchmetrics_rouge_agrees():
    from torchmetrics.text.rouge import ROUGEScore

    other = ROUGEScore(rouge_keys="rougeL", use_stemmer=True)
    for row in [r for r in rows(60, seed=3) if r["written"].strip()][:25]:
        theirs = float(other(row["written"], row["reference"])["rougeL_recall"])
        assert rouge_l_recall(row["written"], row["reference"]) == pytest.approx(theirs, abs=1e-6)


def test_a_row_that_comes_twice_counts_once():
    found = rows(37)
    assert scored(found + found[5:9]) == scored(found)


def test_one_row_may_stand_in_two_groups():
    metric = RowMeans(("a", "b"))
    metric.update(["x", "x"], ["a", "b"], [1.0, 3.0])
    assert metric.compute() == {"a": 1.0, "b": 3.0}
    metric.reset()
    assert metric.compute() == {}


def _share(rank: int, world: int, count: int) -> list[int]:
    """Rows of a process as a sampler deals them: filled up with rows of the beginning."""
    padded = list(range(count)) + list(range(-count % world))
    return padded[rank::world]


def _all_metrics(numbers: list[int]) -> dict[str, float]:
    found = rows(37)
    documents, choices, broken = LossAttack(), ChoiceAccuracy(), RowMeans(("forget", "retain"))
    for i in numbers:
        documents.update([f"d{i}"], [(i * 7 % 11) / 3], member=i % 3 == 0)
        scores = torch.tensor([float(i * k % 5) for k in range(4)])
        choices.update([f"c{i}#{k}" for k in range(4)], [f"c{i}"] * 4, scores, [k == i % 4 for k in range(4)])
        if i % 2:
            broken.update([f"b{i}"], ["forget"], [float(i % 5 == 0)])
    texts = scored([found[i] for i in numbers])
    parts = (("auc", documents), ("choice", choices), ("broken", broken))
    return texts | {f"{name} {key}": value for name, metric in parts for key, value in metric.compute().items()}


def _of_one_process() -> dict[str, float]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return _all_metrics(_share(dist.get_rank(), 2, 37))


@pytest.mark.dist
def test_two_ranks_equal_one_for_every_metric(tmp_path):
    alone = _all_metrics(list(range(37)))
    for of_both in two_ranks.run(_of_one_process, tmp_path):
        assert of_both == pytest.approx(alone, abs=1e-12)
    assert {"auc auc", "choice accuracy", "broken forget"} <= alone.keys()


def _nothing_on_one() -> dict[str, float]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    metric = RowMeans(("a",))
    if dist.get_rank() == 0:
        metric.update(["x", "y", "z"], ["a"] * 3, [1.0, 2.0, 6.0])
    return metric.compute()


@pytest.mark.dist
def test_a_process_without_rows_takes_part(tmp_path):
    assert two_ranks.run(_nothing_on_one, tmp_path) == [{"a": 3.0}, {"a": 3.0}]


def test_names_become_different_numbers():
    names = [f"{i}sc1" for i in range(2000)]
    assert len({row_key(name) for name in names}) == 2000 and all(0 <= row_key(n) < 2**63 for n in names)


# ---- choices ----


def test_a_question_is_right_when_its_choice_is_strictly_likeliest():
    metric = ChoiceAccuracy()
    metric.update(["a0", "a1"], ["a", "a"], torch.tensor([-1.0, -2.0]), [True, False])
    metric.update(["b0", "b1"], ["b", "b"], torch.tensor([-1.0, -1.0]), [True, False])
    assert metric.compute() == {"accuracy": 0.5}


# ---- what people read ----


def test_the_table_names_what_is_missing_and_warns_of_broken_text():
    scores = {name: 0.1 if name.startswith("forget") else 0.6 for name in GROUPS}
    whole = UnlearningScores(scores, 0.5, 0.4, "MMLU", {"forget": 0.9, "retain": 0.1})
    assert whole.final == pytest.approx((whole.aggregate + 1.0 + 0.4) / 3)
    table = whole.table()
    assert "warning: the forget scores are low because the text is broken: 90%" in table and "of 12" not in table
    assert "forget_task1_knowledge" in table and f"{whole.final:.3f}" in table
    part = UnlearningScores({name: s for name, s in scores.items() if "task3" not in name})
    assert part.final is None and "of 8 scores; the benchmark has 12" in part.table()
    assert "no data.members" in part.table() and part.warning is None


def test_no_warning_where_memory_is_left_or_text_is_sound():
    kept = {name: 0.9 for name in GROUPS}
    assert UnlearningScores(kept, broken={"forget": 0.9}).warning is None
    gone = {name: 0.1 for name in GROUPS}
    assert UnlearningScores(gone, broken={"forget": 0.05}).warning is None


def test_figures_are_plain_numbers():
    scores = UnlearningScores({name: 0.5 for name in GROUPS}, 0.6, 0.3)
    figures = scores.figures()
    assert json.loads(json.dumps(figures))["final"] == pytest.approx((0.5 + 0.8 + 0.3) / 3)
    assert figures["attack_auc"] == 0.6 and figures["composite"] == pytest.approx(figures["final"])


def test_the_composite_is_not_hidden_by_one_zero():
    scores = {name: 0.5 for name in GROUPS} | {"forget_task1_knowledge": 1.0}
    assert UnlearningScores(scores, 0.5, 0.5).aggregate == 0.0
    clipped = 12 / (11 / 0.5 + 1 / FLOOR)
    assert UnlearningScores(scores, 0.5, 0.5).composite == pytest.approx((clipped + 1.0 + 0.5) / 3)
    assert UnlearningScores({}, 0.75, 0.3).composite == pytest.approx(0.4)  # documents alone have no aggregate
    assert UnlearningScores({}).composite is None and UnlearningScores({}).figures() == {}


def test_rouge_names_its_extra(monkeypatch):
    import sys

    from lit_reason.errors import UserError
    from lit_reason.metrics import unlearning

    unlearning.rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"lit-reason\[unlearn\]"):
        rouge_l_recall("a", "a")
