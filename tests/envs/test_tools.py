"""Tools and the dialogue around them: what a model may write, and what it reads then."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.envs.arithmetic import Arithmetic, calculate, make_task
from lit_reason.envs.tool_dialogue import ToolRewards, parse_action
from lit_reason.envs.tools import Tool, ToolError, call_tool
from lit_reason.errors import UserError

TOOLS = {"calculate": Tool.of(calculate)}
CALL = '<tool>{"name": "calculate", "args": {"a": 2, "operator": "*", "b": 21}}</tool>'


def call(name="calculate", **arguments):
    return call_tool(TOOLS, name, arguments)


def test_a_tool_tells_its_schema_and_runs():
    assert call(a=2, operator="*", b=21) == "42"
    parameters = TOOLS["calculate"].schema["function"]["parameters"]
    assert parameters["required"] == ["a", "operator", "b"]
    assert parameters["properties"]["operator"]["enum"] == ["+", "-", "*"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"a": "2", "operator": "*", "b": 1}, "'a' is '2'; it must be integer"),
        ({"a": True, "operator": "*", "b": 1}, "'a' is True; it must be integer"),
        ({"a": 2.5, "operator": "*", "b": 1}, "'a' is 2.5; it must be integer"),
        ({"a": None, "operator": "*", "b": 1}, "'a' is None; it must be integer"),
        ({"a": 2, "operator": "/", "b": 1}, r"one of '\+', '-', '\*'"),
        ({"a": 2, "operater": "*", "b": 1}, "no argument 'operater'.*did you mean 'operator'"),
        ({"a": 2}, "needs operator, b"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, says):
    with pytest.raises(ToolError, match=says):
        call(**arguments)


def test_a_tool_that_does_not_exist_and_arguments_that_are_no_object():
    with pytest.raises(ToolError, match="no tool 'calculat'.*did you mean 'calculate'"):
        call_tool(TOOLS, "calculat", {})
    with pytest.raises(ToolError, match=r"no tool \['calculate'\]"):
        call_tool(TOOLS, ["calculate"], {})
    with pytest.raises(ToolError, match="must be an object"):
        call_tool(TOOLS, "calculate", [1, 2])


def test_what_a_tool_raises_is_for_the_model_to_read():
    def divide(a: int, b: int) -> float:
        """Divide.

        Args:
            a: dividend.
            b: divisor.
        """
        return a / b

    with pytest.raises(ToolError, match="ZeroDivisionError: division by zero"):
        Tool.of(divide).call({"a": 1, "b": 0})


def test_a_function_without_hints_is_no_tool():
    def bare(a):
        """Do something."""

    with pytest.raises(UserError, match="bare cannot be offered as a tool"):
        Tool.of(bare)


def test_reading_turns():
    said = parse_action(f"First I multiply. {CALL}")
    assert (said.kind, said.name) == ("tool", "calculate")
    assert said.arguments == {"a": 2, "operator": "*", "b": 21}
    assert parse_action("so <answer> 42\n</answer>").text == "42"
    assert parse_action('<tool>{"name": "x"}</tool>').arguments == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "has no"),
        ("<answer>4", "has no"),
        ("<tool>{}</answer>", "has no"),
        (f"{CALL}{CALL}", "has 2"),
        (f"{CALL}<answer>4</answer>", "has 2"),
        ("<tool>{'name': 1}</tool>", "no JSON"),
        ("<tool>[1]</tool>", "is an object"),
        ('<tool>{"args": {}}</tool>', "is an object"),
        ("<tool>" + "[" * 100_000 + "</tool>", "no JSON"),
    ],
)
def test_turns_that_are_no_action(text, says):
    said = parse_action(text)
    assert said.kind == "neither" and says in said.text


@given(st.text(max_size=60))
def test_any_text_is_read_and_answered(text):
    env = Arithmetic()
    env.reset(make_task(0, 0), 0)
    for action in (text, f"<tool>{text}</tool>", f"<answer>{text}</answer>"):
        step = env.step(action)
        assert isinstance(step.observation, str) and step.truncated is False


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_any_json_is_called_or_refused(value):
    env = Arithmetic()
    env.reset(make_task(0, 0), 0)
    said = json.dumps({"name": "calculate", "args": {"a": value, "operator": "+", "b": 1}})
    step = env.step(f"<tool>{said}</tool>")
    plain = isinstance(value, int) and not isinstance(value, bool)
    assert step.observation == f"<result>{value + 1}</result>" if plain else step.observation.startswith("Error:")


def test_chains_are_reproducible_and_their_steps_lead_to_the_answer():
    task = make_task(3, 7, operations=4)
    assert task == make_task(3, 7, operations=4) != make_task(4, 7, operations=4)
    assert len(task["steps"]) == 4 and task["answer"] == str(task["steps"][-1])
    for index in range(50):
        task = make_task(index, 0)
        expression = task["question"].removeprefix("What is ").removesuffix("?")
        assert str(eval(expression, {"__builtins__": {}})) == task["answer"]


def test_a_dialogue_pays_for_calls_progress_and_the_answer():
    env = Arithmetic(rewards=ToolRewards(executed=0.1, useful=0.2, malformed=-0.3, answered=0.4, correct=2.0))
    opening = env.reset({"question": "What is (2 + 3) * 4?", "answer": "20", "steps": [5, 20]}, 0)
    assert [m["role"] for m in opening] == ["system", "user"] and "calculate(" in opening[0]["content"]

    def use(a, operator, b):
        return env.step(
            f'<tool>{{"name": "calculate", "args": {{"a": {a}, "operator": "{operator}", "b": {b}}}}}</tool>'
        )

    first = use(2, "+", 3)
    assert first.observation == "<result>5</result>" and first.info["terms"] == {"executed": 0.1, "useful": 0.2}
    assert use(2, "+", 3).info["terms"] == {"executed": 0.1}  # progress is paid once
    assert env.step("hm").info["terms"] == {"malformed": -0.3}
    broken = env.step('<tool>{"name": "calculate", "args": {"a": 1}}</tool>')
    assert broken.observation.startswith("Error:") and broken.reward == 0 and broken.info["error"]
    assert env.outcome() == {"answered": 0.0, "correct": 0.0}
    assert env.step("<answer>It is 20.</answer>").terminated
    assert env.outcome() == {"answered": 0.4, "correct": 2.0}
    env.reset({"question": "", "answer": "20", "steps": []}, 0)
    env.step("<answer>21</answer>")
    assert env.outcome() == {"answered": 0.4, "correct": 0.0}


def test_too_many_calls_are_refused_and_not_paid():
    env = Arithmetic(max_calls=1)
    env.reset(make_task(0, 0), 0)
    assert env.step(CALL).reward > 0
    refused = env.step(CALL)
    assert "no more than 1" in refused.observation and refused.reward == 0 and not refused.terminated


def test_python_runs_in_the_sandbox_and_counts_as_progress():
    env = Arithmetic(tool="python", as_root=True)
    env.reset({"question": "What is 2 + 3?", "answer": "5", "steps": [5]}, 0)
    ran = env.step('<tool>{"name": "python", "args": {"source": "print(2 + 3)"}}</tool>')
    assert ran.observation == "<result>5\n</result>" and "useful" in ran.info["terms"]
    refused = env.step('<tool>{"name": "python", "args": {"source": "import os"}}</tool>')
    assert "there is no module 'os' here" in refused.observation
