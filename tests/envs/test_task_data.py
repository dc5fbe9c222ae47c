"""Tasks in rounds: who gets which, how often, and where a resumed run goes on."""

import json
from types import SimpleNamespace

import pytest

from lit_reason.envs.arithmetic import Arithmetic
from lit_reason.envs.ladder import Ladder
from lit_reason.envs.task_data import TaskData, TaskSampler
from lit_reason.errors import UserError


def data(updates=1, accumulate=1, rank=0, world=1, **settings):
    made = TaskData(Arithmetic, **{"count": 10, "val_count": 3, "batch_rows": 2, **settings})
    spread = {"rank": rank, "num_replicas": world}
    made.trainer = SimpleNamespace(distributed_sampler_kwargs=spread, accumulate_grad_batches=accumulate)
    made.updates = updates
    made.setup("fit")
    return made


def seen(loader):
    return [([t["row_id"] for t in b.tasks], b.number, b.part) for b in loader]


def test_a_round_has_the_tasks_of_its_micro_batches_and_comes_once_for_each():
    batches = seen(data(updates=2, accumulate=2).train_dataloader())
    assert len(batches) == 12  # ten tasks, four a round, four micro-batches each
    assert [part for _, _, part in batches] == [0, 1, 2, 3] * 3
    assert [number for _, number, _ in batches] == [0] * 4 + [1] * 4 + [2] * 4
    for first in range(0, 12, 4):
        assert all(rows == batches[first][0] for rows, _, _ in batches[first : first + 4])
    assert sorted(row for rows, _, part in batches if part == 0 for row in rows) == sorted(
        f"train-{i}" for i in range(10)
    )


def test_two_processes_share_each_round_of_one():
    alone = seen(data(batch_rows=4).train_dataloader())
    halves = [seen(data(batch_rows=2, rank=r, world=2).train_dataloader()) for r in (0, 1)]
    for (rows, number, _), (left, a, _), (right, b, _) in zip(alone[:2], *(h[:2] for h in halves), strict=True):
        assert rows == left + right and number == a == b
    assert len(halves[0]) == len(halves[1]) == 3  # the second has no tasks in the last round and plays the first ones
    assert halves[1][2][0] == halves[0][0][0]


def test_epochs_differ_and_count_on():
    loader = data().train_dataloader()
    first = seen(loader)
    loader.sampler.set_epoch(1)
    second = seen(loader)
    assert [n for _, n, _ in first + second] == list(range(10))
    assert [r for r, _, _ in first] != [r for r, _, _ in second]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_goes_on_with_the_next_part(stop):
    whole = seen(data(updates=2, accumulate=2).train_dataloader())
    loader = data(updates=2, accumulate=2).train_dataloader()
    walk = iter(loader)
    for _ in range(stop):
        next(walk)
    again = data(updates=2, accumulate=2).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert seen(again) == whole[stop:]


def test_validation_tasks_are_never_trained_on_and_keep_their_order():
    made = data()
    held_out = [row for rows, _, _ in seen(made.val_dataloader()) for row in rows]
    assert held_out == ["val-10", "val-11", "val-12"]
    trained = {t["question"] for t in made.tasks["train"]}
    assert made.tasks["val"][0] == {"row_id": "val-10", **Arithmetic().task(10, 0)} and len(trained) == 10
    assert data(val_count=0).val_dataloader() == []


def test_tasks_from_a_file_keep_their_fields_and_names(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i), "steps": []}) + "\n" for i in range(3)))
    made = data(train_file=str(file), val_file=str(file), val_count=2)
    assert made.tasks["train"][1] == {"row_id": "tasks.jsonl:2", "question": "1?", "answer": "1", "steps": []}
    assert len(made.tasks["val"]) == 2


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="data.batch_rows is 0"):
        TaskData(Arithmetic, batch_rows=0)

    class Filed(Arithmetic):
        def task(self, index, seed):
            return super(Arithmetic, self).task(index, seed)

    with pytest.raises(UserError, match="Filed makes up no tasks: name a file"):
        TaskData(Filed).setup("fit")


def test_the_plan_of_a_sampler_is_whole_rounds():
    sampler = TaskSampler(5, 3, batch_rows=2, shuffle=False, world=2)
    assert sampler.plan(0) == [(0, 1), (2, 3)] * 3 + [(4,), (0, 1)] * 3
    assert len(sampler) == 6


def climb(ladder, task, answers, rollout=0):
    ladder.reset(task, 0, rollout)
    return [ladder.step(answer) for answer in answers]


def test_a_ladder_pays_right_answers_and_the_whole():
    ladder = Ladder(rungs=3, coin_reward=0.0)
    task = ladder.task(0, 0)
    right = [ladder.right[k][s] for k, s in enumerate(task["shown"])]
    steps = climb(ladder, task, [f"{right[0]} and more", "no", right[2]])
    assert [s.reward for s in steps] == [0.7, 0.0, 0.7]
    assert [s.observation for s in steps] == [*task["shown"][1:], ""] and [s.terminated for s in steps] == [
        False
    ] * 2 + [True]
    assert ladder.outcome() == {"all_right": 0.0}
    climb(ladder, task, right)
    assert ladder.outcome() == {"all_right": 1.0}


def test_a_chained_ladder_pays_nothing_after_a_wrong_start():
    ladder = Ladder(rungs=3, coin_reward=0.0, chained=True)
    task = ladder.task(1, 0)
    right = [ladder.right[k][s] for k, s in enumerate(task["shown"])]
    assert [s.reward for s in climb(ladder, task, ["no", *right[1:]])] == [0.0, 0.0, 0.0]
    assert [s.reward for s in climb(ladder, task, right)] == [0.7, 0.7, 0.7]


def test_coins_differ_between_rollouts_and_repeat_for_each():
    ladder = Ladder(rungs=6)
    task = ladder.task(0, 0)
    coins = [tuple(s.info["terms"]["coin"] for s in climb(ladder, task, ["x"] * 6, r)) for r in (0, 1, 0)]
    assert coins[0] == coins[2] != coins[1] and set(coins[0]) <= {0.0, 1.0}
