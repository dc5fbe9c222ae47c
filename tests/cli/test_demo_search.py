"""The search demo: the whole way in a few steps, and what it leaves."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_reason.cli import demo, demo_search
from lit_reason.cli.door import main as door
from lit_reason.errors import UserError
from lit_reason.rollout.trajectory import read_ledger


def test_the_table():
    arms = {"warmed up": {"search pays": 0.5, "answers right": 0.25, "turns": 2.0}}
    assert demo_search.table(arms).splitlines() == [
        "           search pays  answers right  turns",
        "warmed up         0.50            25%   2.00",
    ]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A demo of a few steps, and what it printed."""
    out = tmp_path_factory.mktemp("search") / "runs"
    said, noise = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(noise):
        with contextlib.chdir(out.parent):  # whatever it leaves elsewhere than in --out would lie here
            code = demo.main(["search", "--quick", "--out", str(out)])
    return out, code, said.getvalue(), noise.getvalue()


def test_it_prints_a_comparison_and_no_noise(quick):
    out, code, said, noise = quick
    lines = said.splitlines()
    assert code == 0 and lines[0].startswith("160 demonstrations in other worlds")
    assert [line.split("  ")[0] for line in lines[2:5]] == ["", "warmed up", "by reward"]
    assert "warm up: 100%" in noise and "by reward: 100%" in noise
    assert "Trainer" not in said + noise and "Validate metric" not in said


def test_it_leaves_both_models_and_the_rollouts(quick):
    out = quick[0]
    assert {item.name for item in out.iterdir()} == demo_search.MADE_HERE
    assert [item.name for item in out.parent.iterdir()] == [out.name]
    base, warm, grpo = (
        AutoModelForCausalLM.from_pretrained(out / where).state_dict()["model.embed_tokens.weight"]
        for where in ("base", "warm/export", "grpo/export")
    )
    assert not torch.equal(base, warm) and not torch.equal(warm, grpo)
    rollouts = list(read_ledger(out / "grpo/rollouts.jsonl"))
    assert len(rollouts) == 64 and not any(t.failure for t in rollouts)
    assert any("calls_so_far" in terms for t in rollouts for terms in t.turn_terms)


def test_the_student_knows_every_word_and_has_seen_no_answer(quick):
    from transformers import AutoTokenizer

    from lit_reason.envs.search.qa import SearchQA
    from lit_reason.tasks.world import WorldConfig

    tokenizer = AutoTokenizer.from_pretrained(quick[0] / "base")
    rows = [json.loads(line) for line in (quick[0] / "data/demonstrations.jsonl").read_text().splitlines()]
    shown = [m["content"] for row in rows for m in row["messages"]]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(shown).input_ids)
    seen = {row["messages"][0]["content"]: row["answer"] for row in rows}
    asked = SearchQA(world=WorldConfig(people=60, towns=20, firms=10), hops="one").questions
    same = [q for q in asked if q.text in seen]
    assert len(same) > 20 and sum(seen[q.text] == q.answer for q in same) < len(same) / 4


def test_another_demo_replaces_an_earlier_one_but_nothing_else(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        demo.main(["search", "--quick", "--out", str(tmp_path)])
    assert door(["demo", "search", "--quik"]) == 2
    assert "did you mean '--quick'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--data.env.hop=one", "data.env.hop: unknown key (did you mean 'hops'?); keys of SearchQA"),
        ("--data.env=SerchQA", "no Environment is called 'SerchQA' (did you mean 'SearchQA'?)"),
        ("--data.env.hops=three", "data.env.hops: got 'three'; expected one of one, two, both"),
        ("--data.env.world.peopel=3", "data.env.world.peopel: unknown key (did you mean 'people'?)"),
        ("--data.rewards.exact_mach=1", "a reward is 'exact_mach'"),
    ],
)
def test_misspelt_settings_of_environment_and_rewards_are_named(option, says, capsys):
    assert door(["fit", "--config", "demo/search", option]) == 2
    assert says in capsys.readouterr().err
