"""C4 in a tiny size: every case samples as many tokens as it is told to, and keeps what it was given."""

from __future__ import annotations

import pytest

from benchmarks import grpo_steps, rollouts
from benchmarks.chat_samples import TINY
from benchmarks.peers import rollouts as peers
from lit_reason.envs.task_data import TaskData

HERE = [case.name for case in rollouts.CASES if case.name != "trl"]  # TRL lives in an environment of its own


def test_the_work_is_a_function_of_the_seed_and_ragged():
    one, again, other = (rollouts.work("four_turns", seed, 199) for seed in (3, 3, 4))
    assert one == again != other
    assert len(one.lengths) == 4 and all(len(turn) == 16 for turn in one.lengths) and len(one.observations) == 3
    low, high = rollouts.BOUNDS["four_turns"]
    assert all(low <= n <= high for turn in one.lengths for n in turn) and len(set(one.lengths[0])) > 5


@pytest.mark.parametrize("case", HERE)
def test_every_case_makes_the_rollouts_it_is_given(case):
    play = (rollouts.player if case == "lit_reason" else peers.player)(case, TINY)
    given = rollouts.Work([[5, 6, 7], [8]], [[2, 3, 1, 4, 2, 2, 5, 1]] * 2, [[[9, 10 + i] for i in range(8)]])
    rows = play(given)
    for i, row in enumerate(rows):
        prompt, n = given.prompts[i // 4], given.lengths[0][i]
        assert row[: len(prompt)] == prompt
        assert row[len(prompt) + n : len(prompt) + n + 2] == [9, 10 + i]
        assert len(row) == len(prompt) + n + 2 + n
    assert len({tuple(row[3:5]) for row in rows[:4]}) > 1  # sampled, not the likeliest


def test_our_steps_train_on_the_task_that_both_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_steps, "COMPLETION_TOKENS", 4)
    grpo_steps.write_model(tmp_path, TINY)
    figures = grpo_steps.train(tmp_path, 1)
    assert figures["cpu_s"] > 0 and 1 <= figures["tokens"] <= grpo_steps.COMPLETION_TOKENS
    from benchmarks.one_turn import OneTurn

    data = TaskData(OneTurn, count=3, val_count=0)
    data.setup("fit")
    assert [task["question"] for task in data.tasks["train"]] == [grpo_steps.question(i) for i in range(3)]
    assert grpo_steps.reward("1 21") == 0.5
