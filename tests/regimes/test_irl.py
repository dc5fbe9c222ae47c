"""Inverse RL on a tiny student: phases that survive a kill, brakes, both kinds of reward, input to be refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_reason.cli.reason_cli import build
from lit_reason.core.config import OptimConfig
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.data.packing import pack_rows
from lit_reason.errors import UserError
from lit_reason.regimes.irl.answers import AnswerPlayer, answer_logps, make_pair, text_row
from lit_reason.regimes.irl.config import RewardConfig, RoundConfig
from lit_reason.regimes.irl.demonstrations import Demonstration, RoundPlan, shuffled
from lit_reason.regimes.irl.rates import rates
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

PLAIN = ["--model.lm.overrides.attention_dropout=0.0"]
SAVER = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
SAVER += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.save_on_exception=true"]
IMPLICIT = ["--model.reward.model=policy", "--model.rounds.policy_steps=0", "--model.policy.kl=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("irl")
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "data/train.jsonl", partial(chain.record, config, 0, held_out=False), 24)
    rows = [json.loads(line) for line in (folder / "data/train.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": " 1 1 1"}
        for row in rows[:10]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def made(folder: Path, *options: str):
    return build("fit", ["--config", "smoke/irl", f"--vars.folder={folder}", "--trainer.max_steps=2", *options])


def run(folder: Path, *options: str):
    cli = made(folder, *options)
    cli.run_verb()
    return cli


def log(cli):
    return read_metrics(run_folder(cli.trainer) / "metrics.csv")


def losses(cli) -> dict[int, float]:
    return dict(log(cli).points("train/loss"))


# ---- phases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(folder) -> list[str]:
    """Settings under which everything there is to remember matters."""
    return [
        *("--trainer.max_steps=12", "--model.rounds.policy_steps=4", "--model.policy.updates=2"),
        *("--model.rounds.samples=2", "--model.rounds.prompts=8", "--model.sampling.batch_size=8"),
        *("--model.reward.start=fresh", "--model.reward.replay=mixture", "--model.rounds.max_round_kl=30"),
        *("--model.reward.schedule=linear",),
    ]


@pytest.fixture(scope="module")
def uninterrupted(folder, busy):
    return run(folder, *busy, *SAVER)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="reward"),
        pytest.param(2, id="border", marks=pytest.mark.slow),
        pytest.param(3, id="between updates"),
        pytest.param(6, id="round"),
        pytest.param(7, id="second round", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_a_kill_in_any_phase(folder, busy, uninterrupted, step):
    (saved,) = (run_folder(uninterrupted.trainer) / "checkpoints").glob(f"*step={step}.ckpt")
    rest = run(folder, *busy, f"--ckpt_path={saved}")
    assert losses(rest) == {s: loss for s, loss in losses(uninterrupted).items() if s >= step}
    for name, weight in rest.model.named_parameters():
        assert torch.equal(weight, dict(uninterrupted.model.named_parameters())[name]), name
    for name in ("train/kl_previous", "train/drift", "train/identical"):
        expected = [point for point in log(uninterrupted).points(name) if point[0] >= step]
        assert log(rest).points(name) == expected, name


def test_a_kill_while_sampling_keeps_the_chunks_that_are_done(folder, busy, uninterrupted, monkeypatch):
    calls, play = [], AnswerPlayer.play

    def dying(self, tasks, *args, **settings):
        calls.append(len(tasks))
        if (
            len(calls) == 2 + 2 + 2
        ):  # two chunks and two batches of rollouts in round 0, then the second chunk of round 1
            raise RuntimeError("killed")
        return play(self, tasks, *args, **settings)

    monkeypatch.setattr(AnswerPlayer, "play", dying)
    cli = made(folder, *busy, *SAVER)
    with pytest.raises(RuntimeError, match="killed"):
        cli.run_verb()
    saved = max((run_folder(cli.trainer) / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    again: list[int] = []
    monkeypatch.setattr(
        AnswerPlayer, "play", lambda self, tasks, *a, **k: (again.append(len(tasks)), play(self, tasks, *a, **k))[1]
    )
    rest = run(folder, *busy, f"--ckpt_path={saved}")
    assert losses(rest) == {s: loss for s, loss in losses(uninterrupted).items() if s >= 6}
    assert len(again) == 1 + 2  # one chunk of the second round was there already


def test_pairs_of_earlier_rounds_are_replayed(uninterrupted):
    rounds = uninterrupted.model.rounds
    numbers = rounds._buffer.index[rounds.chosen, 0]
    assert set(numbers) == {0, 1} and (numbers == 0).sum() <= (numbers == 1).sum()


def test_places_of_a_round_are_reward_steps_then_policy_steps(folder):
    plan = RoundPlan(2, 3)
    assert [plan.place(step) for step in range(5)] == [
        ("reward", 0),
        ("reward", 1),
        ("policy", 0),
        ("policy", 1),
        ("policy", 2),
    ]
    ours = [shuffled([1, 2], first, 3, 7).tolist() for first in range(0, 21, 3)]
    flat = sum(ours, [])
    assert [sorted(flat[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3 and flat[:7] != flat[7:14]
    assert flat[2:6] == shuffled([1, 2], 2, 4, 7).tolist()


def test_each_rate_runs_through_its_own_steps_of_every_round():
    optim = OptimConfig(schedule="linear", warmup=0.0, final_lr=0.0)
    reward, rounds = RewardConfig(schedule="linear"), RoundConfig(reward_steps=3, policy_steps=5)
    of_policy, of_reward = rates(optim, reward, rounds)
    for start in (0, 8):
        assert [of_reward(start + s) for s in range(3)] == [1.0, 0.5, 0.0]
        assert [of_policy(start + 3 + s) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    implicit, _ = rates(optim, RewardConfig(model="policy"), RoundConfig(reward_steps=5, policy_steps=0))
    assert [implicit(5 + s) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


# ---- brakes ------------------------------------------------------------------------------------------------------


def test_the_policy_rests_once_it_has_gone_too_far(folder):
    options = ["--model.rounds.policy_steps=4", "--trainer.max_steps=6", "--model.rounds.max_round_kl=1e-6", *PLAIN]
    cli = made(folder, *options)
    c = cli.model.round_config  # else all of the student's endless answers earn the same
    cli.model.round_config = dataclasses.replace(c, no_end_reward=None)
    seen = []
    cli.trainer.callbacks.insert(0, keeping(seen))
    cli.run_verb()
    assert [step for step, _ in log(cli).points("train/resting")] == [3, 4, 5]
    assert not torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[6])
    assert torch.equal(seen[0], seen[2]), "the reward's steps leave the policy alone"


def keeping(seen: list):
    from lightning.pytorch import Callback

    class Keep(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.lm.base.model.layers[0].mlp.up_proj.weight.detach().clone())

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.on_train_start(trainer, pl_module)

    return Keep()


@pytest.mark.slow
def test_the_reward_rests_once_it_tells_all_pairs_apart(folder):
    options = ["--model.rounds.reward_steps=14", "--trainer.max_steps=15", "--model.reward.stop_accuracy=0.6", *PLAIN]
    cli = run(folder, *options)
    resting = [step for step, _ in log(cli).points("train/resting")]
    assert resting == [10, 11, 12, 13], "ten batches are looked at, and the policy's step is taken"
    assert log(cli).points("train/entropy")[-1][0] == 14


def test_the_reward_rests_when_held_out_accuracy_falls(folder, monkeypatch):
    said = iter([0.8, 0.9, 0.7, 0.7])
    cli = made(folder, "--model.rounds.reward_steps=5", "--trainer.max_steps=5", "--model.reward.check_every=1")
    monkeypatch.setattr(type(cli.model), "held_out_accuracy", lambda self: next(said))
    cli.run_verb()
    assert [step for step, _ in log(cli).points("train/resting")] == [3, 4]


# ---- the reward --------------------------------------------------------------------------------------------------


def test_scores_are_normalised_on_demonstrations_and_answers_without_end_are_punished(folder):
    cli = run(folder, "--trainer.max_steps=3", *PLAIN)
    regime = cli.model.eval()
    texts = [(d.prompt, d.answer) for d in map(regime.data.demonstration, range(16))]
    shown = regime.reward.normalised(regime.scores(texts))
    assert float(shown.mean()) == pytest.approx(0, abs=1e-5) and float(shown.std()) == pytest.approx(1, abs=1e-4)
    whole, cut = (
        Trajectory(
            prompt=0, rollout=0, ids=[*texts[0][0].tolist(), 9, end], turn_id=[NOT_SAMPLED] * len(texts[0][0]) + [0, 0],
            logprob=[0.0] * (len(texts[0][0]) + 2), turn_terms=[{}], outcome_terms={}, stops=["end"],
            finished=finished, policy_version=0, row_id="x", facts={"errors": 0},
        )
        for end, finished in ((regime.data.stop_ids[0], True), (8, False))
    )  # fmt: skip
    paid = [t.outcome for t in regime.scored([whole, cut])]
    assert paid[1] == -1.0
    raw = regime.scores([(texts[0][0], np.array(whole.ids[-2:]))])
    assert paid[0] == pytest.approx(float(regime.reward.normalised(raw)), abs=1e-6)
    assert float(regime.update_meter.compute()["ended_reward"]) == pytest.approx(paid[0], abs=1e-6)


def test_the_penalty_on_scores_is_part_of_the_rewards_loss(folder, monkeypatch):
    """Demonstrations score 3 and answers 1: the linear loss is -2, and half the mean square of the scores 2.5."""
    cli = made(folder, "--trainer.max_steps=1", "--model.reward.loss=linear", "--model.reward.chi2=0.4")
    monkeypatch.setattr(
        "lit_reason.models.reward.RewardModel.forward",
        lambda self, ids, positions, edges: torch.tensor([3.0, 1.0] * (len(edges) // 2)) + 0 * self.score.weight.sum(),
    )
    cli.run_verb()
    assert losses(cli)[0] == pytest.approx(-2 + 0.4 * 2.5, abs=1e-6)


@pytest.mark.slow
def test_fresh_rewards_begin_each_round_anew_and_warm_ones_go_on(folder):
    base = ["--trainer.max_steps=5", "--model.reward.lr=0.01", *PLAIN]
    first = {start: losses(run(folder, *base, f"--model.reward.start={start}"))[4] for start in ("fresh", "warm")}
    assert first["warm"] < 0.3 < first["fresh"]


@pytest.mark.slow
def test_a_critic_makes_the_policys_steps_ppo(folder):
    cli = run(folder, "--model.critic.trunk=shared", "--trainer.max_steps=4")
    assert cli.model.critic.value.weight.abs().max() > 1e-4
    assert "train/dead_groups" not in log(cli).series


def test_a_critic_begins_every_round_as_the_reward_just_learnt(folder):
    still = ["--model.optim.lr=1e-30", "--model.policy.kl=0", "--trainer.max_steps=8", *PLAIN]  # two rounds of 2 + 2
    cli = run(folder, *still, "--model.critic.trunk=separate", "--model.rounds.critic_start=reward")
    regime = cli.model.eval()
    shown = [regime.data.demonstration(i) for i in range(3)]
    pack = pack_rows([text_row(d.prompt, d.answer) for d in shown])
    with torch.no_grad():
        value = regime.critic(torch.empty(0), pack.ids, pack.positions, pack.cu_seqlens)[pack.cu_seqlens[1:].long() - 1]
        score = regime.reward.normalised(regime.reward(pack.ids, pack.positions, pack.cu_seqlens))
    torch.testing.assert_close(value, score, rtol=1e-4, atol=1e-4)
    assert float(score.std()) > 1e-2


@pytest.mark.slow
def test_a_shared_base_serves_three_models_and_stays_as_it_was(folder):
    cli = made(folder, "--model.lm.adapter.rank=2", "--trainer.max_steps=6", "--model.rounds.kl_reference=initial")
    cli.run_verb()
    names = {name for name, w in cli.model.named_parameters() if w.requires_grad}
    assert any(".reward." in n for n in names) and any(".default." in n for n in names)
    assert all("lora_" in n or n.startswith("reward.score") for n in names)
    assert [s for s, v in log(cli).points("train/kl_initial") if v > 0]


def test_the_exported_reward_scores_in_transformers_and_can_be_evaluated(folder):
    kinds = json.dumps({"short": str(folder / "pairs.jsonl")})
    pairs = [f"--data.pairs_file={kinds}", "--trainer.limit_val_batches=1.0", *PLAIN]
    cli = run(folder, *pairs, "--trainer.callbacks+=RewardExport", "--trainer.max_steps=4")
    out = run_folder(cli.trainer) / "reward"
    theirs, regime = AutoModelForSequenceClassification.from_pretrained(out).eval(), cli.model.eval()
    first, second = regime.data.held_out_pairs()[:2]
    crossed = first._replace(rejected=second.chosen)  # both of its answers stand in another pair too

    def score(row) -> float:
        return float(theirs(input_ids=torch.tensor(row.ids.astype(int))[None]).logits)

    with torch.no_grad():
        expected = [score(pair.chosen) - score(pair.rejected) for pair in (first, crossed, second)]
        found = regime.held_out_margins([first, crossed, second]).tolist()
    assert found == pytest.approx(expected, abs=1e-5) and len(first.chosen) > len(first.rejected)
    (told,) = {value for _, value in log(cli).points("val/pair_accuracy")}
    low, high = (log(cli).last(f"val/pair_accuracy_{end}") for end in ("low", "high"))
    assert low < told <= high and log(cli).last("val/length_accuracy") == 1.0
    assert log(cli).last("val/pair_accuracy/short") == told and log(cli).last("val/pair_accuracy_low/short") == low
    with contextlib.redirect_stdout(io.StringIO()) as said:
        options = ["--config", "smoke/irl", f"--vars.folder={folder}", f"--model.reward.path={out}", *pairs[:1], *PLAIN]
        figures = build("evaluate", options).run_verb()
    assert figures[0]["val/pair_accuracy"] == pytest.approx(told) and "val/pair_accuracy" in said.getvalue()


# ---- the implicit reward -----------------------------------------------------------------------------------------


def test_log_probabilities_of_answers_are_those_of_the_plain_model(folder):
    cli = made(folder, *PLAIN)
    cli.model.trainer = cli.trainer
    cli.model.configure_model()
    lm = cli.model.lm.eval()
    prompt, answers = np.array([2, 9, 10, 3]), [np.array([11, 12, 4]), np.array([13, 4])]
    found = answer_logps(lm, pack_rows([text_row(prompt, a) for a in answers]))
    for answer, logp in zip(answers, found, strict=True):
        ids = torch.tensor(np.concatenate([prompt, answer]))[None]
        logits = lm.hf(input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + k, int(token)] for k, token in enumerate(answer))
        torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("loss", "first"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("linear", 0.0)])
def test_an_implicit_round_begins_at_margin_zero_and_opens_it(folder, loss, first):
    cli = run(
        folder,
        *IMPLICIT,
        f"--model.reward.loss={loss}",
        "--model.rounds.reward_steps=4",
        "--trainer.max_steps=4",
        *PLAIN,
    )
    assert losses(cli)[0] == pytest.approx(first, abs=1e-5)
    assert losses(cli)[3] < losses(cli)[0] and log(cli).last("train/margin") > 0.01
    assert not hasattr(cli.model, "reward") and not log(cli).points("train/resting")


def test_in_the_first_round_spin_is_dpo_and_later_it_is_not(folder):
    options = [
        *IMPLICIT,
        "--model.rounds.reward_steps=3",
        "--trainer.max_steps=6",
        "--model.reward.replay=last",
        *PLAIN,
    ]
    spin, dpo = (
        losses(run(folder, *options, f"--model.reward.reference={which}")) for which in ("previous", "initial")
    )
    assert [spin[s] for s in range(3)] == pytest.approx([dpo[s] for s in range(3)], abs=1e-6)
    assert spin[3] == pytest.approx(math.log(2), abs=1e-5) and dpo[3] != pytest.approx(math.log(2), abs=1e-3)


def test_rounds_of_one_step_generate_online(folder):
    options = [*IMPLICIT, "--model.rounds.reward_steps=1", "--model.rounds.prompts=8", "--model.reward.replay=last"]
    cli = run(folder, *options, "--trainer.max_steps=3")
    assert [value for _, value in log(cli).points("train/round")] == [0, 1, 2]
    assert len(cli.model.rounds._buffer) == 24


# ---- pairs -------------------------------------------------------------------------------------------------------


def answered(tokens: list[int], finished: bool) -> Trajectory:
    return Trajectory(
        prompt=0, rollout=1, ids=[7, 8, *tokens], turn_id=[NOT_SAMPLED] * 2 + [0] * len(tokens),
        logprob=[0.0] * (2 + len(tokens)), turn_terms=[{}], outcome_terms={}, stops=[""], finished=finished,
        policy_version=0, row_id="x",
    )  # fmt: skip


SHOWN = Demonstration("x", np.array([7, 8]), np.array([1, 2, 3, 4, 99]))


@pytest.mark.parametrize(
    ("tokens", "finished", "chosen", "rejected"),
    [
        ([5, 6, 99], True, [1, 2, 3, 4, 99], [5, 6, 99]),  # both ended: as they are
        ([5, 6], False, [1, 2], [5, 6]),  # cut off: the demonstration is cut alike
        ([5] * 9, False, [1, 2, 3, 4], [5] * 9),  # a short demonstration still loses its end token
        ([99], True, [1, 2, 3, 4, 99], [99]),  # it said nothing: that is an answer
    ],
)
def test_no_end_token_tells_a_cut_answer_from_a_demonstration(tokens, finished, chosen, rejected):
    pair = make_pair(0, SHOWN, answered(tokens, finished), {99}, "cut")
    assert (pair.chosen.tolist(), pair.rejected.tolist(), pair.sample) == (chosen, rejected, 1)
    dropped = make_pair(0, SHOWN, answered(tokens, finished), {99}, "drop")
    assert (dropped is None) == (not finished)


def test_a_demonstration_that_was_cut_off_takes_the_end_from_the_answer():
    pair = make_pair(0, SHOWN._replace(answer=np.array([1, 2])), answered([5, 6, 99], True), {99}, "cut")
    assert pair.chosen.tolist() == [1, 2] and pair.rejected.tolist() == [5, 6]
    assert make_pair(0, SHOWN, answered([], False), {99}, "cut") is None


# ---- input that must be refused ----------------------------------------------------------------------------------


def rows(folder: Path, name: str, answers: list[str]) -> str:
    path = folder / f"{name}.jsonl"
    turns = [[{"role": "user", "content": " a 1"}, {"role": "assistant", "content": a}] for a in answers]
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    return f"--data.train_file={path}"


def test_no_and_one_demonstration_are_refused(folder):
    (folder / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        run(folder, f"--data.train_file={folder / 'none.jsonl'}")
    with pytest.raises(UserError, match="1 usable demonstration.*at least two"):
        run(folder, rows(folder, "one", [" 1 2"]))


def test_empty_demonstrations_are_left_out_and_counted(folder, caplog):
    with pytest.raises(UserError, match=r"1 usable demonstration\(s\)"):
        run(folder, rows(folder, "empty", [" 1 2", "", ""]))
    assert "train: 2 rows could not be used: 2 x empty assistant turn" in caplog.text
    (folder / "text.jsonl").write_text('{"text": " 1 2 3"}\n' * 2)
    with pytest.raises(UserError, match=r"0 usable demonstration\(s\).*\(2 without prompt or answer\)"):
        run(folder, f"--data.train_file={folder / 'text.jsonl'}")


def test_demonstrations_longer_than_the_window_are_dropped_by_name(folder):
    with pytest.raises(UserError, match=r"2 too long \(data.max_length is 12\)"):
        run(folder, rows(folder, "long", [" 1" * 30, " 2" * 30]), "--data.max_length=12")


def always(answer):
    """A player that gives every prompt this answer."""

    def play(self, tasks, policy_version=0, seed=0, *, progress=False):
        found = []
        for p, task in enumerate(tasks):
            tokens, asked = answer(task), list(task["ids"])
            found.append(
                Trajectory(
                    prompt=p,
                    rollout=0,
                    ids=asked + tokens,
                    turn_id=[NOT_SAMPLED] * len(asked) + [0] * len(tokens),
                    logprob=[0.0] * (len(asked) + len(tokens)),
                    turn_terms=[{}],
                    outcome_terms={},
                    stops=["end"],
                    finished=True,
                    policy_version=0,
                    row_id=task["row_id"],
                    facts={"errors": 0},
                )  # fmt: skip
            )
        return found

    return play


def test_a_policy_that_answers_all_prompts_alike_stops_the_run(folder, monkeypatch):
    cli = made(folder)
    monkeypatch.setattr(AnswerPlayer, "play", always(lambda task: [9, 9, 4]))
    with pytest.raises(UserError, match="round 0: the policy has collapsed"):
        cli.run_verb()


def test_a_round_of_identical_pairs_stops_the_run(folder, monkeypatch):
    cli = made(folder)
    monkeypatch.setattr(
        AnswerPlayer, "play", always(lambda task: cli.model.data.demonstration(task["row"]).answer.tolist())
    )
    with pytest.raises(UserError, match="of 16 answers 16 equal the demonstration"):
        cli.run_verb()


def test_a_reward_that_is_no_number_or_flat_stops_the_run(folder, monkeypatch):
    cli = made(folder)
    monkeypatch.setattr(
        "lit_reason.models.reward.RewardModel.token_scores",
        lambda self, ids, *_: self.score.weight.sum() * ids * math.nan,
    )
    with pytest.raises(UserError, match="round 0, reward step 0: the reward's loss is nan"):
        cli.run_verb()
    cli = made(folder, "--trainer.max_steps=3")
    monkeypatch.setattr(
        "lit_reason.models.reward.RewardModel.token_scores",
        lambda self, ids, *_: self.score.weight.sum() * (0.0 * ids + 1),
    )
    with pytest.raises(UserError, match="the same score"):
        cli.run_verb()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.reward.model=policy"], "set rounds.policy_steps to 0"),
        (["--model.rounds.policy_steps=0"], "a reward that nothing uses"),
        (["--model.rounds.policy_steps=3", "--model.policy.updates=2"], "multiple of policy.updates"),
        (["--model.policy.resample=1"], "policy.resample"),
        (["--model.reward.mixture=1.0"], r"reward.mixture is 1.0"),
        (["--model.reward.stop_accuracy=0.4"], "stop_accuracy is 0.4"),
        (["--model.rounds.probe=1"], "rounds.probe is 1"),
        (["--model.rounds.critic_start=reward"], "needs critic.trunk separate"),
        (
            ["--model.rounds.critic_start=reward", "--model.critic.trunk=separate", "--model.lm.adapter.rank=2"],
            "a model of its own: set reward.path",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        made(folder, *options)


def test_other_data_is_refused(folder):
    with pytest.raises(UserError, match="needs demonstrations: use data DemonstrationData, not TraceData"):
        run(folder, "--data=TraceData", f"--data.train_file={folder / 'data/train.jsonl'}", "--data.batch_rows=4")
