"""Question answering by search: the index against BM25 written out, dialogues step by step, corpora of one's own."""

import builtins
import json
import math

import pytest

from lit_reason.envs.demonstrations import demonstration, demonstrations
from lit_reason.envs.search.index import Index, read_passages, words
from lit_reason.envs.search.qa import SearchQA, _index
from lit_reason.envs.task_data import TaskData
from lit_reason.errors import UserError
from lit_reason.tasks.world import Passage, WorldConfig, build_world

SMALL = WorldConfig(people=30, towns=8, firms=6)
TEXTS = ("The cat sat on the mat.", "A dog sat", "Cats and dogs: the cat, the dog", "nothing of the kind", "cat")
INDEX = Index([Passage(f"p{n}", text) for n, text in enumerate(TEXTS)])


def bm25(query, texts, k1=1.5, b=0.75):
    """Lucene's BM25, as its documentation writes it."""
    documents = [words(t) for t in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(query):
            n, f = sum(word in d for d in documents), document.count(word)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            score += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cat", "the cat", "dog sat", "CAT cat mat", "unheard of dog"])
def test_passages_come_in_the_order_of_bm25(query):
    scores = bm25(query, TEXTS)
    wanted = [f"p{n}" for n in sorted(range(len(TEXTS)), key=lambda n: -scores[n]) if scores[n] > 0]
    assert [p.id for p in INDEX.search(query, 9)] == wanted
    assert [p.id for p in INDEX.search(query, 2)] == wanted[:2]


def test_words_that_are_nowhere_find_nothing():
    assert INDEX.search("zebra", 3) == INDEX.search("", 3) == INDEX.search("?! --", 3) == []


def test_there_is_work_for_the_search():
    """The question itself finds its passages rarely; words that fit the phrasings find them nearly always."""
    world, index = build_world(WorldConfig()), Index(build_world(WorldConfig()).passages)

    def found(q, queries):
        return all(g in {p.id for p in index.search(s, 3)} for g, s in zip(q.gold, queries, strict=True))

    for hops, most in ((1, 0.6), (2, 0.1)):
        asked = [q for q in world.questions if len(q.gold) == hops][:200]
        assert sum(found(q, [q.text] * hops) for q in asked) / 200 < most
        assert sum(found(q, [s.format(o=q.bridge) for s in q.queries]) for q in asked) / 200 > 0.9


def test_a_question_of_two_hops_step_by_step():
    env = SearchQA(world=SMALL, hops="two", syntax="tags")
    task = next(t for t in map(lambda n: env.task(n, 0), range(50)) if demonstration(env, t))
    system, question = env.reset(task, 0)
    assert system["role"] == "system" and "<search>" in system["content"]
    assert question == {"role": "user", "content": task["question"]}
    asked = SearchQA(world=SMALL, syntax="tags", instructions="reasoning").reset(task, 0)[0]["content"]
    assert asked.startswith(system["content"]) and "<reasoning>" in asked and "<reasoning>" not in system["content"]
    first = env.step(f"I wonder. <search>{task['queries'][0]}</search>")
    assert first.observation.startswith("<information> [1] ") and task["bridge"] in first.observation
    assert first.info["terms"] == {"executed": 0.2, "useful": 0.5}
    assert env.step(f"<search>{task['queries'][0]}</search>").info["terms"] == {"executed": 0.2}  # found before
    second = env.step(f"<search>{task['queries'][1].format(o=task['bridge'])}</search>")
    assert "useful" in second.info["terms"] and task["answer"] in second.info["result"]
    over = env.step(f"<answer> the {task['answer'].lower()}. </answer>")
    assert over.terminated and env.outcome() == {"answered": 0.2, "correct": 1.0}
    env.reset(task, 0)
    env.step("<answer>Atlantis</answer>")
    assert env.outcome()["correct"] == 0.0


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        ("<search>a</search><answer>b</answer>", "this one has 2"),
        ("nothing", "this one has no"),
        ("<search>a</answer>", "this one has no"),
        ('<tool>{"name": "search", "args": {"query": "a"}}</tool>', "this one has no"),
        ("<search> ?? </search>", "nothing found"),
    ],
)
def test_turns_in_tags_that_go_wrong_are_answered(said, answered):
    env = SearchQA(world=SMALL, syntax="tags")
    env.reset(env.task(0, 0), 0)
    step = env.step(said)
    assert answered in step.observation and not step.terminated


def test_calls_in_json_and_arguments_of_the_wrong_type():
    env = SearchQA(world=SMALL, max_calls=3, passages=1, passage_words=4)
    assert env.stops == ("</tool>", "</answer>") and "search(query: str)" in env.reset(env.task(0, 0), 0)[0]["content"]
    name = env.index.passages[0].text
    fine = env.step(f'<tool>{{"name": "search", "args": {{"query": {json.dumps(name)}}}}}</tool>')
    assert fine.observation == f"<result>[1] {' '.join(name.split()[:4])}</result>"
    wrong = env.step('<tool>{"name": "search", "args": {"query": 7}}</tool>')
    assert wrong.observation == "Error: search: argument 'query' is 7; it must be string" and not wrong.info["ran"]
    assert env.step('<tool>{"name": "serch", "args": {"query": "a"}}</tool>').observation.startswith("Error: there is")
    assert "no more than 3 calls" in env.step('<tool>{"name": "search", "args": {"query": "a"}}</tool>').observation


def corpus(tmp_path, rows=None):
    rows = rows or [
        {"id": "fox", "title": "Foxes", "text": "They eat grapes."},
        {"id": "owl", "text": "Owls hunt mice at night."},
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_corpus_and_questions_of_ones_own(tmp_path):
    env = SearchQA(corpus=corpus(tmp_path))
    assert env.index.passages[0] == Passage("fox", "Foxes. They eat grapes.")
    env.reset({"question": "What do owls hunt?", "answers": ["mice", "a mouse"]}, 0)
    hit = '<tool>{"name": "search", "args": {"query": "owls"}}</tool>'
    assert "useful" in env.step(hit).info["terms"]  # without gold passages an answer in the result counts, once
    assert "useful" not in env.step(hit).info["terms"]
    env.step("<answer>Mouse</answer>")
    assert env.outcome()["correct"] == 1.0
    with pytest.raises(UserError, match="SearchQA makes up no tasks: name a file of them"):
        env.task(0, 0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "mice"}, "field 'question'"),
        ({"question": "What?"}, "neither 'answer' nor a list 'answers'"),
        (
            {"question": "What?", "answer": "mice", "gold": ["owls"]},
            "no passage with the id 'owls'.*did you mean 'owl'",
        ),
        ({"question": "What?", "answer": "mice", "gold": "owl"}, "'gold' is 'owl'; it must be a list"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_before_training(tmp_path, row, says):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "Who?", "answer": "owls"}) + "\n" + json.dumps(row) + "\n")
    found = corpus(tmp_path)
    data = TaskData(lambda: SearchQA(corpus=found), train_file=str(path), val_count=0)
    with pytest.raises(UserError, match=f"data.train_file, row questions.jsonl:2: .*{says}"):
        data.setup("fit")


def test_a_corpus_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="row corpus.jsonl:1: a passage needs a field 'text'"):
        read_passages(corpus(tmp_path, [{"txt": "a"}]))
    with pytest.raises(UserError, match="two passages with the id 'a'"):
        Index([Passage("a", "x"), Passage("b", "y"), Passage("a", "z")])
    with pytest.raises(UserError, match="no passage"):
        Index([])
    with pytest.raises(UserError, match="passages is 0"):
        SearchQA(world=SMALL, passages=0)


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'lit-reason\[search\]'"):
        Index([Passage("a", "x")])


def test_the_world_has_no_further_question():
    env = SearchQA(world=SMALL, hops="one")
    assert env.task(59, 0)["hops"] == 1
    with pytest.raises(UserError, match="the world has 60 questions"):
        env.task(60, 0)


def test_all_environments_of_a_run_share_one_index():
    _index.cache_clear()
    assert SearchQA(world=SMALL).index is SearchQA(world=SMALL, passages=1).index
    assert SearchQA(world=WorldConfig(people=30, towns=8, firms=6, seed=1)).index is not SearchQA(world=SMALL).index


def test_demonstrations_search_and_answer():
    env = SearchQA(world=SMALL, syntax="tags", instructions="none")
    rows = list(demonstrations(env, (env.task(i, 0) for i in range(len(env.questions)))))
    assert 0.8 * len(env.questions) < len(rows) < len(env.questions)
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles in (["user", "assistant"] * 2, ["user", "assistant"] * 3)
        assert row["answer"] in row["messages"][-2]["content"]  # the last result holds what is answered
        assert row["messages"][-1]["content"] == f"<answer> {row['answer']} </answer>"
