"""Experts of environments: what they show is what the environment pays in full."""

import json

import pytest

from lit_reason.cli import door
from lit_reason.envs.arithmetic import Arithmetic, make_task
from lit_reason.envs.demonstrations import demonstration
from lit_reason.envs.environment import Environment
from lit_reason.envs.ladder import Ladder
from lit_reason.envs.search.qa import SearchQA
from lit_reason.envs.tool_dialogue import parse_action
from lit_reason.errors import UserError
from lit_reason.tasks.world import WorldConfig


@pytest.mark.parametrize("index", range(5))
def test_the_expert_of_arithmetic_earns_every_reward_there_is(index):
    env = Arithmetic(operations=3)
    task = env.task(index, 7)
    row = demonstration(env, task)
    said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    calls = [parse_action(text).arguments for text in said[:-1]]
    assert [env.tools["calculate"].call(c) for c in calls] == [str(step) for step in task["steps"]]
    assert [m["content"] for m in row["messages"][3::2]] == [f"<result>{step}</result>" for step in task["steps"]]
    assert env.outcome() == {"answered": 0.2, "correct": 1.0} and not env.left


def test_every_operation_of_a_task_leads_to_its_step():
    do = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for index in range(20):
        task = make_task(index, 0)
        assert [do[o](a, b) for a, o, b in task["calls"]] == task["steps"]
        assert [a for a, _, _ in task["calls"][1:]] == task["steps"][:-1]  # each goes on from the last


def test_the_expert_of_a_ladder_is_right_on_every_rung():
    env = Ladder(rungs=4, coin_reward=0.0)
    demonstration(env, env.task(3, 0))
    assert env.outcome() == {"all_right": 1.0} and env.hits == [True] * 4


def test_a_search_by_tool_calls_finds_what_one_by_tags_finds():
    small = WorldConfig(people=30, towns=8, firms=6)
    tags, tool = (SearchQA(world=small, syntax=syntax) for syntax in ("tags", "tool"))
    for index in range(10):
        one, other = demonstration(tags, tags.task(index, 0)), demonstration(tool, tool.task(index, 0))
        assert (one is None) == (other is None)
        if other:
            assert other["messages"][2]["content"].startswith('<tool>{"name": "search", "args": {"query": ')
            assert len(other["messages"]) == len(one["messages"])


def test_what_has_no_expert_says_so():
    class Mute(Environment):
        def reset(self, task, seed, rollout=0):
            return [{"role": "user", "content": "?"}]

        def step(self, action):
            raise AssertionError

        def outcome(self):
            return {}

    with pytest.raises(UserError, match="Mute has no expert"):
        demonstration(Mute(), {})
    with pytest.raises(UserError, match="'calls'"):
        demonstration(Arithmetic(), {"question": "1?", "answer": "1", "steps": []})


def test_the_verb_writes_the_training_tasks_of_a_recipe(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--config", "smoke/grpo", "--data.count=5", "--data.seed=4", "--data.env.rungs=3"]
    assert door.main(["demonstrate", str(out), "--count", "3", *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    env = Ladder([" a", " b"], ["1", "2", "3"], rungs=3)
    assert [r["messages"][0]["content"] for r in rows] == [env.task(i, 4)["shown"][0] for i in range(3)]
    assert "demonstrations  3" in capsys.readouterr().out
    assert door.main(["demonstrate", str(out), "--config", "smoke/sft"]) == 2
    assert "TraceData" in capsys.readouterr().err
