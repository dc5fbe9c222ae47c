"""Tasks of reasoning-gym; where the package is not installed only the message that names the extra is checked."""

import builtins

import pytest

from lit_reason.envs.reasoning_gym import OPEN_ENDED, ReasoningGym, dataset
from lit_reason.errors import UserError


@pytest.fixture
def gym():
    """The package; its tasks are sampled, since importing all of it takes seconds."""
    return pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *rest)

    dataset.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'lit-reason\[reasoning-gym\]'"):
        ReasoningGym("leg_counting")


@pytest.mark.parametrize("name", ["leg_counting", "basic_arithmetic", "syllogism"])
def test_the_stored_answer_is_right_and_another_is_not(gym, name):
    env = ReasoningGym(name)
    tasks = [env.task(index, 3) for index in (0, 1, 499, 500, 501)]
    assert tasks == [env.task(index, 3) for index in (0, 1, 499, 500, 501)]
    assert tasks[0] != tasks[1] and tasks[0]["question"] != env.task(0, 4)["question"]
    for task in tasks:
        opening = env.reset(task, 0)
        assert opening[1]["content"] == task["question"]
        assert env.step(f"<answer>{task['answer']}</answer>").terminated
        assert env.outcome() == {"answered": 0.2, "correct": 1.0} and env.correct(task["answer"])
        env.reset(task, 0)
        env.step("<answer>none of this</answer>")
        assert env.outcome()["correct"] < 0.5 and not env.correct("none of this")


def test_a_calculator_lies_beside_it(gym):
    env = ReasoningGym("leg_counting")
    env.reset(env.task(0, 0), 0)
    called = env.step('<tool>{"name": "calculate", "args": {"a": 4, "operator": "*", "b": 3}}</tool>')
    assert called.observation == "<result>12</result>"
    assert ReasoningGym("leg_counting", tool="none").tools == {}


def test_names_and_settings_that_cannot_be_are_refused(gym):
    for name in OPEN_ENDED:
        with pytest.raises(UserError, match=f"'{name}' is left out"):
            ReasoningGym(name)
    with pytest.raises(UserError, match="no task 'leg_countin'.*did you mean 'leg_counting'"):
        ReasoningGym("leg_countin")
    with pytest.raises(UserError, match="no setting 'min_animal'.*did you mean 'min_animals'"):
        ReasoningGym("leg_counting", settings={"min_animal": 2})
    with pytest.raises(UserError, match="task 'leg_counting' with {'min_animals': -1}"):
        ReasoningGym("leg_counting", settings={"min_animals": -1})
