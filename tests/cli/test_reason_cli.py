"""The command line in one process, on toy classes: composition, interpolation, saved configs, errors."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import cli_toys
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lit_reason.cli import door, reason_cli
from lit_reason.errors import UserError

BASE = """\
# A toy run.
seed_everything: 3
vars: {w: 24}
model:
  class_path: PlainToyRegime
  init_args:
    width: ${vars.w}
    lm: {path: abc, adapter: {rank: 4}}
    optim: {lr: 1e-4}
data:
  class_path: ToyData
  init_args:
    train_file: x.jsonl
    rows: ${trainer.max_steps}
    condense: {strategy: epic, tau: 0.25}
trainer:
  max_steps: 9
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - {class_path: ToyBell, init_args: {every: 2}}
"""


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    """Toy classes in place of the real ones, and an empty working folder."""
    monkeypatch.setattr(reason_cli, "house_classes", lambda: (cli_toys.ToyTrainer, cli_toys.ToyRegime))
    monkeypatch.setattr(sys, "argv", ["lit-reason"])
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def build(*argv: str, verb: str = "fit"):
    return reason_cli.build(verb, ["--config", "base.yaml", *argv])


def refusal(capsys, *argv: str, verb: str = "fit", config: str = "base.yaml") -> str:
    """The message of a refused command; checks that it is short and that the exit code is 2."""
    capsys.readouterr()
    assert door.main([verb, "--config", config, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err and "Union" not in err and "NoneType" not in err
    assert len(err) < 600 and err.startswith("lit-reason: ")
    return err


def settings(cli) -> dict:
    """The parsed configuration without the names of its files."""
    return {key: value for key, value in cli.config.as_dict().items() if key != "config"}


def overlay(text: str) -> str:
    Path("over.yaml").write_text(text)
    return "--config=over.yaml"


def test_interpolation_follows_later_files_and_options():
    cli = build()
    assert cli.model.width == 24 and cli.datamodule.rows == 9
    assert cli.model.optim_config.lr == 1e-4 and cli.model.lm_config.adapter.rank == 4
    cli = build(overlay("vars: {w: 25}\n"), "--trainer.max_steps", "3")
    assert cli.model.width == 25 and cli.datamodule.rows == 3
    assert build("--vars.w", "7").model.width == 7


def test_later_files_append_callbacks_and_options_reach_nested_fields():
    cli = build(
        overlay("trainer:\n  callbacks+:\n    - {class_path: ToyBell, init_args: {sound: dong}}\n"),
        "--model.optim.schedule=constant",
        "--data.condense.tau=0.5",
    )
    bells = [c for c in cli.trainer.callbacks if isinstance(c, cli_toys.ToyBell)]
    assert [(bell.every, bell.sound) for bell in bells] == [(2, "ding"), (1, "dong")]
    assert cli.model.optim_config.schedule == "constant"
    assert cli.datamodule.condense.tau == 0.5 and cli.datamodule.condense.strategy == "epic"


def test_a_config_of_the_users_own_is_not_overwritten(capsys):
    own = Path("config.yaml")
    own.write_text(BASE)
    assert "config.yaml: a run keeps its whole recipe there" in refusal(capsys, config="config.yaml")
    assert own.read_text() == BASE


@pytest.mark.parametrize("given", [["--model.lm.adapter", "null"], ["--model.lm.adapter=null"]])
def test_an_option_of_a_class_takes_null(given):
    assert build().model.lm_config.adapter.rank == 4
    assert build(*given).model.lm_config.adapter is None
    assert build("--model.lm.adapter.folder=null").model.lm_config.adapter.folder is None


def test_class_is_switched_by_its_short_name():
    cli = build("--model", "LoudToyRegime", "--model.volume", "2")
    assert type(cli.model) is cli_toys.LoudToyRegime
    assert cli.model.volume == 2.0 and cli.model.optim_config.lr == 1e-4


def test_settings_left_behind_by_a_change_of_class_are_told(capsys):
    build("--model", "LoudToyRegime")
    note = capsys.readouterr().err
    assert "base.yaml:7: model.init_args.width is dropped by the change to LoudToyRegime" in note
    assert "optim" not in note
    build("--model", "LoudToyRegime", "--model.width=5")
    assert "dropped" not in capsys.readouterr().err
    build(overlay("model: {class_path: LoudToyRegime, init_args: {volume: 2}}\n"), "--model=PlainToyRegime")
    assert "over.yaml:1: model.init_args.volume is dropped" in capsys.readouterr().err


def test_evaluate_takes_its_arguments_from_the_method(capsys):
    assert door.main(["evaluate", "--config", "base.yaml", "--limit", "9"]) == 0
    assert "evaluated 9 with width 24" in capsys.readouterr().out


def test_saved_config_repeats_the_run():
    argv = ["--trainer.default_root_dir=run", "--vars.w=7", "--trainer.callbacks.every=5"]
    first = build(*argv)
    first.run_verb()
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 7
    again = reason_cli.build("fit", ["--config", "run/config.yaml"])
    assert settings(again) == settings(first)
    again.run_verb()  # over its own folder: nothing refuses
    figures = reason_cli.build("evaluate", ["--config", "run/config.yaml"])
    assert figures.run_verb() == 4


def test_saved_config_goes_to_the_loggers_folder():
    cli = build("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")
    cli.run_verb()
    assert Path(cli.trainer.log_dir, "config.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\ntrainerr: {max_steps: 3}\n", 1, ["a: unknown key", "keys here"]),
        ("trainerr: {max_steps: 3}\n", 1, ["trainerr: unknown key", "did you mean 'trainer'?"]),
        ("trainer:\n  max_stepz: 3\n", 2, ["trainer.max_stepz", "did you mean 'max_steps'?", "ToyTrainer"]),
        ("model:\n  init_args:\n    lmm: 3\n", 3, ["model.init_args.lmm", "did you mean 'lm'?", "width"]),
        ("model:\n  init_args: {lm: {pth: 3}}\n", 2, ["model.init_args.lm.pth", "did you mean 'path'?"]),
        ("data:\n  init_args:\n\n    condense: {tauu: 1}\n", 4, ["condense.tauu", "did you mean 'tau'?"]),
        (
            "model:\n  class_path: PlainToyRegim\n",
            2,
            ["no ToyRegime", "did you mean 'PlainToyRegime'?", "LoudToyRegime"],
        ),
        ("model: PlainToyRegim\n", 1, ["model: no ToyRegime", "did you mean 'PlainToyRegime'?"]),
        ("model:\n  class_path: LoudToyRegime\n  init_args: {volum: 1}\n", 3, ["did you mean 'volume'?"]),
        ("model:\n  class_pth: LoudToyRegime\n  init_args: {}\n", 2, ["did you mean 'class_path'?"]),
        ("data: {class_path: ToyDatta}\n", 1, ["did you mean 'ToyData'?"]),
        ("trainer:\n  callbacks:\n  - class_path: ToyBel\n", 3, ["callbacks[0].class_path", "'ToyBell'?"]),
        ("trainer:\n  callbacks:\n  - {class_path: ToyBell, init_args: {evry: 1}}\n", 3, ["'every'?"]),
        ("trainer:\n  callbacks+:\n  - {class_path: ToyBell, init_args: {sound: dang}}\n", 3, ["ding, dong"]),
        (
            "data: {init_args: {condense: {strategy: epicc}}}\n",
            1,
            ["'epicc'", "regenerate", "did you mean 'epic'?"],
        ),
        ("data: {init_args: {rows: many}}\n", 1, ["data.init_args.rows", "got 'many'", "a whole number"]),
        ("data: {init_args: {rows: 1.5}}\n", 1, ["data.init_args.rows", "got '1.5'", "a whole number"]),
        ("model: {init_args: {optim: {lr: fast}}}\n", 1, ["optim.lr", "got 'fast'", "a number"]),
        ("model: {init_args: {optim: 3}}\n", 1, ["optim", "got '3'", "a mapping"]),
        ("trainer: {max_steps: [1, 2]}\n", 1, ["trainer.max_steps", "is a list", "a whole number"]),
        ("trainer: {max_steps: {a: 2}}\n", 1, ["trainer.max_steps", "is a mapping", "a whole number"]),
        ("trainer: {precision: bf17}\n", 1, ["trainer.precision", "bf16-mixed", "did you mean 'bf16'?"]),
    ],
)
def test_wrong_key_or_value_in_a_file(capsys, text, line, words):
    message = refusal(capsys, overlay(text))
    assert f"over.yaml:{line}: " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trainer.max_stepz", "3"], ["trainer.max_stepz", "did you mean 'max_steps'?"]),
        (["--trainer.max_stepz=3"], ["trainer.max_stepz", "did you mean 'max_steps'?"]),
        (["--model.lm.pth", "3"], ["model.lm.pth", "did you mean 'path'?"]),
        (["--model.init_args.lmm.path", "3"], ["model.init_args.lmm", "did you mean 'lm'?"]),
        (["--data.condense.tauu=3"], ["data.condense.tauu", "did you mean 'tau'?"]),
        (["--data.condense.strategy=heads"], ["'heads'", "did you mean 'head'?"]),
        (["--model", "LoudToyRegme"], ["did you mean 'LoudToyRegime'?"]),
        (["--trainer.max_steps=fast"], ["got 'fast'", "a whole number"]),
        (["--limt", "3"], ["limt", "unknown key"]),
        (["--trainer.max_step=3"], ["trainer.max_step: unknown key", "did you mean 'max_steps'?"]),  # no abbreviations
        (["--data.condense.ta=1"], ["data.condense.ta: unknown key", "did you mean 'tau'?"]),
        (["--data.condense.tau=nan"], ["data.condense.tau", "got 'nan'", "expected a number"]),
        (
            ["--trainer.callbacks+=ToyBell", "--trainer.callbacks.evry=3", "--trainer.callbacks+=Throughput"],
            ["trainer.callbacks.evry: unknown key", "did you mean 'every'?", "keys of ToyBell"],
        ),
    ],
)
def test_wrong_option(capsys, argv, words):
    message = refusal(capsys, *argv)
    assert "command line" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trainer.accelerator=cup"], ["no accelerator is called 'cup'", "did you mean 'cpu'?", "cuda"]),
        (["--trainer.strategy=dpd"], ["no strategy is called 'dpd'", "did you mean 'ddp'?"]),
        (["--trainer.devices=0"], ["trainer: ", "devices"]),
    ],
)
def test_what_the_trainer_itself_refuses(capsys, argv, words):
    message = refusal(capsys, *argv)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("package", "hint"), [("wandb>=0.1", "pip install 'lit-reason[track]'"), ("tracker", "pip install tracker")]
)
def test_a_logger_whose_package_is_missing_says_how_to_get_it(capsys, monkeypatch, package, hint):
    @functools.wraps(CSVLogger.__init__)
    def refuse(self, *args, **kwargs):
        raise ModuleNotFoundError(f"Requirement '{package}' not met. HINT: Try running `pip install -U '{package}'`")

    monkeypatch.setattr(CSVLogger, "__init__", refuse)
    message = refusal(capsys, "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=x")
    assert f"{package.partition('>')[0]} is not installed: {hint}" in message


def test_stray_word_and_missing_settings(capsys):
    assert "unknown option: stray" in refusal(capsys, "stray")
    assert door.main(["fit", "--model=PlainToyRegime", "--data=ToyData"]) == 2
    assert "train_file" in capsys.readouterr().err
    assert door.main(["fit", "--model=PlainToyRegime"]) == 2
    assert "required and not given: data; start from a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "trainer:\n  max_steps: 3\n  max_steps: 4\n",
            ["over.yaml:3", "trainer.max_steps is given twice", "line 2"],
        ),
        ("trainer:\n  max_steps: [1\n", ["over.yaml:", "not valid YAML"]),
        ("trainer: {max_steps: ${vars.w}}\n", ["over.yaml:1", "not valid YAML", "quotes"]),
        ("trainer:\n\tmax_steps: 1\n", ["over.yaml:2", "not valid YAML", "tabs"]),
        ("- 1\n- 2\n", ["over.yaml: a config is a mapping"]),
        ("hello\n", ["over.yaml: a config is a mapping"]),
        ("# nothing\n", ["over.yaml: the file holds no settings"]),
        ("", ["over.yaml: the file holds no settings"]),
        ("model:\n  init_args:\n    width: ${vars.ww}\n", ["over.yaml:3", "${vars.ww} is not set", "'w'?"]),
    ],
)
def test_malformed_file_is_refused_before_the_heavy_imports(capsys, monkeypatch, text, words):
    monkeypatch.setitem(sys.modules, "lit_reason.cli.reason_cli", None)  # importing it would now fail
    message = refusal(capsys, overlay(text))
    for word in words:
        assert word in message


def test_unknown_interpolation_of_another_section(capsys):
    message = refusal(capsys, overlay("data:\n  init_args:\n    rows: ${trainer.max_stepz}\n"))
    assert "over.yaml:3" in message and "trainer.max_stepz" in message


def test_missing_config_and_unknown_recipe(capsys):
    assert "nope.yaml" in refusal(capsys, config="nope.yaml")
    assert door.main(["fit", "--config"]) == 2
    assert "--config needs a file" in capsys.readouterr().err


def test_section_in_a_file_of_its_own(capsys):
    Path("model.yaml").write_text("class_path: LoudToyRegime\ninit_args:\n  volume: 5\n")
    assert build(overlay("model: model.yaml\n")).model.volume == 5
    Path("model.yaml").write_text("class_path: LoudToyRegime\ninit_args:\n  volum: 5\n")
    message = refusal(capsys, overlay("model: model.yaml\n"))
    assert "model.yaml:3: model.init_args.volum" in message and "did you mean 'volume'?" in message


def test_a_class_that_refuses_its_arguments_is_a_user_error(capsys):
    assert "at most 100" in refusal(capsys, "--model.width=101")


def test_missing_checkpoint_is_refused_before_anything_runs(capsys):
    Path("run").mkdir()
    Path("run/epoch=1.ckpt").touch()
    assert "did you mean 'epoch=1.ckpt'?" in refusal(capsys, "--ckpt_path=run/epoch=2.ckpt")
    assert "run is a folder; checkpoints in it: epoch=1.ckpt" in refusal(capsys, "--ckpt_path=run")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LIT_REASON_TRACEBACK", "1")
    with pytest.raises(UserError, match="max_steps"):
        door.main(["fit", "--config", "base.yaml", "--trainer.max_stepz=3"])
