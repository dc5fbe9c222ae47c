"""`lit-reason verify-rollouts` on the ledger of a real round, and on ledgers that were tampered with."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.core.run_folder import run_folder
from lit_reason.rollout.trajectory import read_ledger
from lit_reason.rollout.verify import inconsistencies
from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    write_student(folder / "base", chain.words(chain.ChainConfig()))
    torch.set_num_threads(1)
    options = ["--trainer.max_steps=3", "--model.dialogue.keep_every=2", "--model.optim.lr=0.01"]
    run = build(
        "fit", ["--config", "smoke/grpo", f"--vars.folder={folder}", *options, "--model.dialogue.turn_tokens=3"]
    )
    run.run_verb()
    return run_folder(run.trainer) / "rollouts.jsonl", folder / "base"


def verify(*arguments):
    return door.main(["verify-rollouts", *map(str, arguments)])


def test_every_second_round_is_kept_and_sound(ledger, capsys):
    file, _ = ledger
    rollouts = list(read_ledger(file))
    assert len(rollouts) == 2 * 64 and {t.policy_version for t in rollouts} == {0, 2}
    assert [inconsistencies(t) for t in rollouts] == [[]] * 128
    assert verify(file) == 0
    assert "128, 0 of them wrong" in capsys.readouterr().out


def test_the_weights_that_sampled_agree_and_later_ones_do_not(ledger, tmp_path, capsys):
    file, base = ledger
    first, third = tmp_path / "first.jsonl", tmp_path / "third.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:64]))
    third.write_text("".join(lines[64:]))
    assert verify(first, "--model", base, "--most", "1e-4") == 0
    assert verify(third, "--model", base, "--most", "1e-4") == 2  # two updates lie between
    assert "nats off on average" in capsys.readouterr().out


TAMPERED = {
    "no log-probability of its own": lambda t: t["logprob"].__setitem__(0, -1.0),
    "torn": lambda t: t["turn_id"].__setitem__(t["turn_id"].index(0) + 1, -1),
    "order": lambda t: t["turn_id"].reverse(),
    "lengths": lambda t: t["ids"].append(1),
    "more than certain": lambda t: t["logprob"].__setitem__(t["turn_id"].index(0), 0.5),
    "stops": lambda t: t["stops"].append("end"),
    "first": lambda t: t["turn_id"].__setitem__(0, 0),
    "credit where nothing was sampled": lambda t: t["advantage"].__setitem__(0, 0.5),
    "credit of other tokens": lambda t: t["advantage"].pop(),
    "a reward that is none": lambda t: t["turn_terms"][0].__setitem__("right", float("nan")),
    "a certainty without end": lambda t: t["logprob"].__setitem__(t["turn_id"].index(0), float("-inf")),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_named(ledger, change, tmp_path, capsys):
    lines = ledger[0].read_text().splitlines()
    long = next(i for i, line in enumerate(lines) if json.loads(line)["turn_id"].count(0) == 3)
    rollout = json.loads(lines[long])
    change(rollout)
    lines[long] = json.dumps(rollout)
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    assert verify(tmp_path / "x.jsonl") == 2
    out = capsys.readouterr().out
    assert f"line {long + 1}, {rollout['row_id']}/{rollout['rollout']}: " in out and "1 of them wrong" in out


def test_an_end_that_is_none_is_seen_with_the_model(ledger, tmp_path, capsys):
    lines = ledger[0].read_text().splitlines()
    ended = next(i for i, line in enumerate(lines) if json.loads(line)["stops"][0] == "end")
    rollout = json.loads(lines[ended])
    rollout["stops"][0] = "length"
    (tmp_path / "x.jsonl").write_text(json.dumps(rollout) + "\n")
    assert verify(tmp_path / "x.jsonl", "--model", ledger[1]) == 2
    assert "turn 0 stopped by 'length'" in capsys.readouterr().out


def with_first(ledger, tmp_path, change):
    """A ledger of one rollout, of three tokens in its first turn, that was changed."""
    lines = map(json.loads, ledger[0].read_text().splitlines())
    rollout = next(rollout for rollout in lines if rollout["turn_id"].count(0) == 3)
    change(rollout)
    (tmp_path / "x.jsonl").write_text(json.dumps(rollout) + "\n")
    return tmp_path / "x.jsonl"


def test_a_stop_string_that_was_never_written_is_seen_with_the_model(ledger, tmp_path, capsys):
    file = with_first(ledger, tmp_path, lambda t: t["stops"].__setitem__(0, "</tool>"))
    assert verify(file) == 0  # without a tokenizer nobody can tell
    assert verify(file, "--model", ledger[1]) == 2
    assert "turn 0 stopped by '</tool>', which its tokens do not hold" in capsys.readouterr().out


def test_an_id_of_another_vocabulary_is_seen_with_the_model(ledger, tmp_path, capsys):
    file = with_first(ledger, tmp_path, lambda t: t["ids"].__setitem__(1, 10**6))
    assert verify(file, "--model", ledger[1]) == 2
    assert "token id 1000000 is not one of the model's" in capsys.readouterr().out


def test_turns_whose_text_would_be_other_tokens_are_counted(ledger, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ledger[1])
    file = with_first(ledger, tmp_path, lambda t: None)
    (kept,) = read_ledger(file)
    turns = set(kept.turn_id) - {-1}
    drift = 0
    for k in turns:
        ids = [i for i, turn in zip(kept.ids, kept.turn_id, strict=True) if turn == k]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        drift += tokenizer(text, add_special_tokens=False).input_ids != ids
    assert verify(file, "--model", ledger[1]) == 0
    assert f"drift     {drift} of {len(turns)} turns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no.jsonl"], "no file no.jsonl"),
        (["FILE", "--most", "1"], "give --model"),
        (["FILE", "--temperature", "0"], "above 0"),
    ],
)
def test_wrong_options(ledger, options, says, capsys):
    assert verify(*[ledger[0] if o == "FILE" else o for o in options]) == 2
    assert says in capsys.readouterr().err
