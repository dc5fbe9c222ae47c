"""Dialogues between a scripted model and real or misbehaving environments, token by token."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_run import write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lit_reason.envs.environment import Environment, Step
from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.rewards.composition import Rewards
from lit_reason.rewards.tool_use import TOOL_USE
from lit_reason.rollout.backend import Backend, Turn
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.observations import ObservationEncoder
from lit_reason.rollout.play import Player
from lit_reason.rollout.trajectory import NOT_SAMPLED, read_ledger, write_ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture
def observations(tokenizer):
    return ObservationEncoder(tokenizer, [tokenizer.eos_token_id])


class Scripted(Backend):
    """An engine whose turns are written beforehand: `script[row][turn]`, rows by (prompt, rollout)."""

    sampler = "script"

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script = tokenizer, script

    def open(self, prompts, names):
        self.prompts = prompts

    def anyone(self, busy):
        return busy

    def fork(self, copies):
        self.rows = [
            (list(ids), iter(turns))
            for ids, turns in zip([p for p in self.prompts for _ in range(copies)], self.script, strict=True)
        ]

    def ids(self, row):
        return list(self.rows[row][0])

    def append(self, row, ids):
        self.rows[row][0].extend(ids)

    def keep(self, rows):
        self.rows = [self.rows[i] for i in rows]

    def step(self, limits, stops=()):
        turns = []
        for (ids, script), limit in zip(self.rows, limits, strict=True):
            text = next(script)
            new = self.tokenizer(text, add_special_tokens=False).input_ids[:limit]
            ids.extend(new)
            end = bool(new) and new[-1] == self.tokenizer.eos_token_id
            turns.append(Turn(new, [-0.5] * len(new), text.removesuffix(" <end>"), "end" if end else "length"))
        return turns


class Counting(Environment):
    """Says how often it was asked; ends at `so`; pays 1 a turn and 10 at the end."""

    def reset(self, task, seed, rollout=0):
        self.asked, self.seen = 0, []
        return [{"role": "user", "content": task["question"]}]

    def step(self, action):
        self.asked += 1
        self.seen.append(action)
        return Step(f"the {self.asked}", 1.0, "so" in action, False, {})

    def outcome(self):
        return {"asked": 10.0 * self.asked}


def play(tokenizer, observations, script, env=Counting, tasks=({"question": "1 + 2"},), **limits):
    config = DialogueConfig(**{"group": 1, "turn_tokens": 8, "answer_tokens": 4, **limits})
    return Player(Scripted(tokenizer, script), observations, env, config).play(list(tasks))


def words(tokenizer, trajectory):
    return tokenizer.convert_ids_to_tokens(trajectory.ids)


def test_every_token_is_where_it_belongs(tokenizer, observations):
    (done,) = play(tokenizer, observations, [["wait 1 <end>", "so 3 <end>"]])
    assert words(tokenizer, done) == (
        "<user> 1 + 2 <end> <assistant> wait 1 <end> <user> the 1 <end> <assistant> so 3 <end>".split()
    )
    n = NOT_SAMPLED
    assert done.turn_id == [n] * 6 + [0] * 3 + [n] * 5 + [1] * 3
    assert [p for p, k in zip(done.logprob, done.turn_id, strict=True) if k == n] == [0.0] * 11
    assert {p for p, k in zip(done.logprob, done.turn_id, strict=True) if k != n} == {-0.5}
    assert (done.turn_rewards, done.outcome, done.finished) == ([1.0, 1.0], 20.0, True)
    assert done.stops == ["end", "end"] and done.sampled == 6


def test_a_turn_cut_at_its_limit_gets_its_end_from_the_template_and_is_not_trained_on_it(tokenizer, observations):
    (done,) = play(tokenizer, observations, [["wait 1 2", "so <end>"]], turn_tokens=3)
    assert words(tokenizer, done)[6:15] == "wait 1 2 <end> <user> the 1 <end> <assistant>".split()
    assert done.turn_id[6:11] == [0, 0, 0, NOT_SAMPLED, NOT_SAMPLED]


def test_the_row_to_train_on_has_the_sampled_tokens_alone(tokenizer, observations):
    (done,) = play(tokenizer, observations, [["wait 1 <end>", "so 3 <end>"]])
    row = done.token_row()
    assert row.ids.tolist() == done.ids
    assert row.weight.tolist() == [0.0] * 6 + [1.0] * 3 + [0.0] * 5 + [1.0] * 3


def test_rollouts_of_unequal_length_keep_their_order_and_groups(tokenizer, observations):
    script = [["so 1 <end>"], ["wait <end>", "wait <end>", "so 2 <end>"], ["wait <end>", "so 3 <end>"], ["so 4 <end>"]]
    tasks = [{"question": "1 + 1", "row_id": "a"}, {"question": "2 + 2", "row_id": "b"}]
    done = play(tokenizer, observations, script, tasks=tasks, group=2)
    assert [(t.prompt, t.rollout, t.row_id, len(t.stops)) for t in done] == [
        (0, 0, "a", 1), (0, 1, "a", 3), (1, 0, "b", 2), (1, 1, "b", 1)]  # fmt: skip
    assert [words(tokenizer, t)[-2] for t in done] == ["1", "2", "3", "4"]
    assert [t.outcome for t in done] == [10.0, 30.0, 20.0, 10.0]


def test_after_the_last_tool_turn_one_turn_is_left_for_the_answer(tokenizer, observations):
    """58 % of the episodes of one reproduction had no turn left to answer in."""
    (done,) = play(tokenizer, observations, [["wait <end>", "so <end>"]], max_turns=1)
    assert len(done.stops) == 2 and done.finished
    (cut,) = play(tokenizer, observations, [["wait <end>", "wait <end>", "never"]], max_turns=1)
    assert len(cut.stops) == 2 and not cut.finished
    assert cut.outcome == 20.0  # asked all the same


def test_room_for_the_answer_is_kept(tokenizer, observations):
    # Of 20 tokens the prompt takes 6 and the answer is kept 4; an observation needs 3 around its text.
    script = [["wait 1 2 3 4 5 6 7 8 9"] * 9]
    (done,) = play(tokenizer, observations, script, total_tokens=20, turn_tokens=10)
    assert done.turn_id.count(0) == 10 and len(done.ids) == 16  # nothing can be said any more: over
    (more,) = play(tokenizer, observations, script, total_tokens=20, turn_tokens=4)
    assert [more.turn_id.count(k) for k in (0, 1, 2)] == [4, 4, 0] and len(more.ids) == 20
    assert words(tokenizer, more)[10:16] == "<end> <user> the 1 <end> <assistant>".split()


def test_a_long_observation_loses_its_middle(tokenizer, observations):
    said = observations.ids("1 2 3 4 5 6 7 8 9", ended=True, room=8)
    assert tokenizer.convert_ids_to_tokens(said) == "<user> 1 2 3 8 9 <end> <assistant>".split()
    assert observations.ids("1", ended=True, room=2) == []


def test_what_an_environment_says_cannot_end_a_turn():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["a few words"], BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<assistant>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    observations = ObservationEncoder(tokenizer, [tokenizer.eos_token_id])
    said = observations.ids("1<end><assistant> so", ended=True, room=50)
    specials = tokenizer.convert_tokens_to_ids(["<end>", "<assistant>"])
    assert [said.count(i) for i in specials] == [1, 1]  # the template's own
    assert tokenizer.decode(said) == "user: 1<end><assistant> so<end><assistant>"  # as text all is there
    assert tokenizer("1<end>").input_ids[-1] == specials[0]  # and the tokenizer is as before


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'assistant' %}<assistant> {{ m.content }} <end> {% endfor %}",
        "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last else m.content | upper }} <end> {% endfor %}",
        "<user> {{ messages[-1].content }} <end> ",
    ],
)
def test_templates_that_rewrite_the_chat_are_refused(folder, template):
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<assistant> {% endif %}"
    with pytest.raises(UserError, match="chat template"):
        ObservationEncoder(tokenizer, [tokenizer.eos_token_id])


class Broken(Counting):
    def reset(self, task, seed, rollout=0):
        self.mode = task["question"]
        return super().reset({"question": "1"}, seed)

    def step(self, action):
        if self.mode == "raise":
            raise OSError("the disk is gone")
        if self.mode == "hang":
            threading.Event().wait(60)
        return super().step(action)

    def outcome(self):
        if self.mode == "late":
            raise ValueError("no verdict")
        return super().outcome()


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
def test_an_environment_that_fails_costs_one_rollout(tokenizer, observations):
    tasks = [{"question": q} for q in ("raise", "hang", "late", "fine")]
    done = play(tokenizer, observations, [["so <end>"]] * 4, env=Broken, tasks=tasks, timeout_s=0.5)
    assert [t.failure for t in done] == [
        "OSError: the disk is gone", "no answer within 0.5 s", "ValueError: no verdict", ""]  # fmt: skip
    assert done[3].outcome == 10.0
    (alone,) = play(tokenizer, observations, [["so <end>"]], env=Broken, tasks=tasks[:1])  # the caller's to judge
    assert alone.failure == "OSError: the disk is gone"


def test_a_prompt_without_room_is_refused(tokenizer, observations):
    with pytest.raises(UserError, match="task 0: its prompt has 6 tokens.*total_tokens=9"):
        play(tokenizer, observations, [[]], total_tokens=9)


def test_the_real_engine_plays(tokenizer, observations, folder):
    torch.manual_seed(0)
    lm = LanguageModel.load(ModelConfig(path=str(folder)))
    engine = Engine(lm, tokenizer, SamplingConfig(temperature=1.0, top_p=1.0), [tokenizer.eos_token_id])
    config = DialogueConfig(group=3, max_turns=2, turn_tokens=5, answer_tokens=4, total_tokens=60)
    tasks = [{"question": "1 + 1"}, {"question": "7 is the answer 3"}]
    done = Player(engine, observations, Counting, config).play(tasks, policy_version=5)
    assert len({tuple(t.ids) for t in done}) == 6 and {t.policy_version for t in done} == {5}
    for t in done:
        with torch.no_grad():
            logits = lm.hf(torch.tensor([t.ids])).logits[0].log_softmax(-1)
        for at, k in enumerate(t.turn_id):
            if k != NOT_SAMPLED:
                assert t.logprob[at] == pytest.approx(float(logits[at - 1, t.ids[at]]), abs=1e-5)
    again = Player(engine, observations, Counting, config).play(tasks, policy_version=5)
    assert [t.ids for t in again] == [t.ids for t in done]


def test_the_ledger_gives_back_what_was_written(tokenizer, observations, tmp_path):
    done = play(tokenizer, observations, [["wait 1 <end>", "so 3 <end>"]])
    write_ledger(tmp_path / "rollouts.jsonl", done)
    write_ledger(tmp_path / "rollouts.jsonl", done)
    assert list(read_ledger(tmp_path / "rollouts.jsonl")) == done * 2
    (tmp_path / "rollouts.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(UserError, match="rollouts.jsonl, line 1: no rollout"):
        list(read_ledger(tmp_path / "rollouts.jsonl"))


def long_turns(dialogue):
    return [float(len(turn.text.split())) for turn in dialogue.turns]


def mood(dialogue):
    """Does what the task says."""
    return {
        "nan": [float("nan")] * len(dialogue.turns), "inf": float("inf"), "short": [1.0], "long": [1.0] * 9,
        "word": "good", "none": None, "fine": 3,
    }[dialogue.task["question"]]  # fmt: skip


def rewarded(tokenizer, observations, script, weights, tasks):
    config = DialogueConfig(group=1, turn_tokens=8, answer_tokens=4)
    return Player(Scripted(tokenizer, script), observations, Counting, config, Rewards(weights)).play(tasks)


def test_rewards_by_name_reach_the_ledger_with_their_weights(tokenizer, observations, monkeypatch):
    monkeypatch.setitem(TOOL_USE, "long_turns", long_turns)
    monkeypatch.setitem(TOOL_USE, "mood", mood)
    weights = {"environment": 2.0, "long_turns": 0.5, "mood": -1.0}
    (done,) = rewarded(tokenizer, observations, [["wait 1 <end>", "so <end>"]], weights, [{"question": "fine"}])
    assert done.turn_terms == [{"reward": 2.0, "long_turns": 1.0}, {"reward": 2.0, "long_turns": 0.5}]
    assert done.outcome_terms == {"asked": 40.0, "mood": -3.0}
    (without,) = rewarded(tokenizer, observations, [["so <end>"]], {"long_turns": 1.0}, [{"question": "fine"}])
    assert (without.turn_terms, without.outcome_terms) == ([{"long_turns": 1.0}], {})


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
def test_a_reward_that_cannot_be_paid_costs_its_rollout_and_no_other(tokenizer, observations, monkeypatch):
    monkeypatch.setitem(TOOL_USE, "mood", mood)
    moods = ["nan", "inf", "short", "long", "word", "none", "unheard of", "fine"]
    script = [["wait <end>", "so <end>"] for _ in moods]
    done = rewarded(tokenizer, observations, script, {"mood": 1.0}, [{"question": m} for m in moods])
    assert [t.failure.removeprefix("RewardError: reward 'mood' ") for t in done] == [
        "of turn 0 is nan; it must be finite", "is inf; it must be finite", "gave 1 numbers for 2 turns",
        "gave 9 numbers for 2 turns", "is 'good'; it must be a number", "is None; it must be a number",
        "raised KeyError: 'unheard of'", "",
    ]  # fmt: skip
    assert done[-1].outcome == 3.0


class Unsteady(Counting):
    """Fails to begin in rollout 0 of the group, or in all; pays what is no number; says what is no step."""

    def reset(self, task, seed, rollout=0):
        self.mode = task["question"]
        if self.mode == "never" or (self.mode == "first" and rollout == 0):
            raise OSError("no browser")
        return super().reset({"question": "1"}, seed)

    def step(self, action):
        found = super().step(action)
        return {"plain": tuple(found), "pays nan": found._replace(reward=float("nan")), "short": (1, 2)}.get(
            self.mode, found
        )

    def close(self):
        if self.mode == "stuck":
            threading.Event().wait(60)


def test_a_task_that_cannot_begin_is_counted_and_the_others_are_played(tokenizer, observations):
    tasks = [{"question": q} for q in ("first", "never", "fine")]
    script = [["so 1 <end>"], ["so 2 <end>"], ["so 3 <end>"], ["so 4 <end>"]]
    with pytest.warns(UserWarning, match="3 of 6 rollouts failed and are left out of the update; first: 0/0: OSError"):
        done = play(tokenizer, observations, script, env=Unsteady, tasks=tasks, group=2)
    assert [bool(t.failure) for t in done] == [True, False, True, True, False, False]
    assert [len(t.ids) > 0 for t in done] == [False, True, False, False, True, True]
    assert [words(tokenizer, t)[-2] for t in done if t.ids] == ["2", "3", "4"]  # each has its own environment's turn


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
def test_what_an_environment_says_is_checked(tokenizer, observations):
    tasks = [{"question": q} for q in ("plain", "pays nan", "short", "stuck")]
    done = play(tokenizer, observations, [["so <end>"]] * 4, env=Unsteady, tasks=tasks, timeout_s=0.5)
    assert [t.failure[:41] for t in done] == [
        "", "RewardError: reward 'reward' of turn 0 is", "TypeError: Step.__new__() missing 3 requi", ""]  # fmt: skip
