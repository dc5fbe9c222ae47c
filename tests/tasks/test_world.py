"""The fictional world: reproducible, consistent, and no answer that can be had without its passage."""

import pytest

from lit_reason.errors import UserError
from lit_reason.tasks.world import ASKED, FACTS, WorldConfig, build_world

SMALL = WorldConfig(people=30, towns=8, firms=6)


def test_every_answer_stands_in_its_last_gold_passage_and_in_no_other():
    for seed in range(3):
        world = build_world(WorldConfig(people=30, towns=8, firms=6, seed=seed))
        text = {p.id: p.text.lower() for p in world.passages}
        for q in world.questions:
            assert [name for name, said in text.items() if q.answer.lower() in said] == [q.gold[-1]], q


def test_questions_of_two_hops_need_both_passages():
    world = build_world(SMALL)
    text = {p.id: p.text for p in world.passages}
    two = [q for q in world.questions if len(q.gold) == 2]
    assert len(two) == 30 * 4 + 6 + 6 * 3  # birth to three, teacher to book; founder to book, seat to three
    for q in two:
        first, last = (text[name] for name in q.gold)
        assert q.bridge in first and q.bridge in last and q.bridge not in q.text
        assert q.answer not in first and len(q.queries) == 2
    assert all(q.bridge == "" and len(q.queries) == 1 for q in world.questions if len(q.gold) == 1)
    assert sum(len(q.gold) == 1 for q in world.questions) == 30 + 8 * 3 + 6


def test_names_of_questions_and_passages_are_unique():
    world = build_world(WorldConfig())
    assert len({p.id for p in world.passages}) == len(world.passages)
    assert len({q.text for q in world.questions}) == len(world.questions) == 1400
    relations = {p.id.partition("-")[0] for p in world.passages}
    assert relations == {*FACTS, "aside"}


def test_worlds_repeat_and_differ_in_facts_alone():
    assert build_world(SMALL) == build_world(SMALL)
    other = build_world(WorldConfig(people=30, towns=8, firms=6, seed=1))
    assert other != build_world(SMALL)

    def coined(world):
        return {
            q.answer for q in world.questions if len(q.gold) == 1 and q.gold[0].startswith(("river", "dish", "feast"))
        }

    assert coined(other) == coined(build_world(SMALL))  # the same rivers, dishes and feasts, in other towns
    answers = {q.text: q.answer for q in build_world(SMALL).questions}
    shared = [q for q in other.questions if q.text in answers]
    assert shared and sum(answers[q.text] == q.answer for q in shared) < len(shared) / 2


def test_every_phrasing_occurs():
    said = " ".join(p.text.lower() for p in build_world(WorldConfig()).passages)
    asked = " ".join(q.text.lower() for q in build_world(WorldConfig()).questions)
    for phrasing in (p for phrasings in FACTS.values() for p in phrasings):
        assert max(phrasing.replace("{s}", "|").replace("{o}", "|").split("|"), key=len).strip() in said, phrasing
    for phrasing in (p for phrasings in ASKED.values() for p in phrasings):
        assert phrasing.partition("{s}")[0] in asked, phrasing


@pytest.mark.parametrize("size", [{"people": 1}, {"people": 226}, {"towns": 0}, {"firms": -1}])
def test_sizes_that_make_no_world_are_refused(size):
    with pytest.raises(UserError, match="a world has 2 to 225 people"):
        WorldConfig(**size)
