"""What every training regime promises, as checks of (regime class, tiny recipe).

Each check is a function of a `Case` marked with `@promise`. They run the recipe as a user would, through the command
line's own classes, in this process. `whole`, `adapted` and `short` are runs that several checks share.

A method that changes no weight says so: `Regime.collects` names the file that its fit makes. It is held to the same
promises, with the file where others have weights: none may change, and the file must be the same however it was made.

Nothing is assumed of data or loss but this: `train/loss` is logged, the data module takes `batch_rows`, whatever a
row is to it, and a checkpoint may be made. What a method cannot do (take an adapter, accumulate micro-batches) it
refuses with a UserError that names the setting; a silent difference breaks the promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from dist import two_ranks
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_reason.cli import door
from lit_reason.cli.reason_cli import ReasonCLI, build
from lit_reason.cli.recipes import Recipe, header_problems, read_header
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.regime import Regime
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError

MOST_LINES = 150
GOLDEN_STEPS = 5
GOLDEN_TOLERANCE = 1e-5  # relative; other machines and torch versions sum in another order
SAVED_STEP = 10
PLAIN = "--model.lm.overrides.attention_dropout=0.0"
BASE_ARGUMENTS = set(inspect.signature(Regime.__init__).parameters)

ASKED: set[tuple[type, str]] = set()  # settings that were misspelt already, of classes that regimes share
PROMISES: list[Callable[[Case], None]] = []


@dataclasses.dataclass(frozen=True)
class Case:
    """A regime to be checked with one recipe.

    Args:
        name: of the recipe, which is also that of its golden file.
        regime: the class.
        recipe: its tiny recipe.
        folder: `vars.folder` of the recipe: data and student lie there, and runs go there.
        golden: file with the losses of the first steps.
    """

    name: str
    regime: type[Regime]
    recipe: Path
    folder: Path
    golden: Path


@dataclasses.dataclass
class Run:
    """A finished run.

    Args:
        cli: `.model`, `.datamodule` and `.trainer` after training.
        losses: `train/loss` by step, as `metrics.csv` has it.
        progress: the figure that the regime says it learns by (`Regime.learns`), in order.
        before: all weights when training began.
        gradients: gradients of each optimizer step.
    """

    cli: ReasonCLI
    losses: dict[int, float]
    progress: list[float]
    before: dict[str, torch.Tensor]
    gradients: list[list[torch.Tensor]]

    @property
    def folder(self) -> Path:
        return run_folder(self.cli.trainer)

    @property
    def curve(self) -> list[float]:
        return list(self.losses.values())

    def weights(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.cli.model.named_parameters())

    def collected(self) -> dict[str, torch.Tensor]:
        """What a method that collects has found; empty of one that trains."""
        name = self.cli.model.collects
        return load_file(self.folder / name) if name else {}

    def changed(self) -> set[str]:
        """Names of the weights that are not what they were."""
        return {name for name, weight in self.weights().items() if not torch.equal(weight, self.before[name])}


class Watch(Callback):
    """Keeps the weights at the start and the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters() if not isinstance(p, DTensor)}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


def find_regimes(package: str = "lit_reason.regimes") -> list[type[Regime]]:
    """Every regime of a package that can train. Nothing is registered; the modules are scanned."""
    root = importlib.import_module(package)
    found: list[type[Regime]] = []
    for name in [module.name for module in pkgutil.walk_packages(root.__path__, f"{package}.")]:
        for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            ours = issubclass(cls, Regime) and cls.__module__ == name and not _unfinished(cls)
            if ours and cls.training_step is not LightningModule.training_step:
                found.append(cls)
    return found


def _unfinished(cls: type) -> bool:
    """Whether a class leaves a method to those that inherit from it. Python's own check asks for a metaclass."""
    return any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))


def recipes_of(regime: type[Regime], folder: Path) -> list[Path]:
    """The recipes of a folder whose model is this regime: it is held to the promises with each of them."""
    chosen = {path: yaml.safe_load(path.read_text())["model"]["class_path"] for path in sorted(folder.glob("*.yaml"))}
    return [
        path for path, name in chosen.items() if name in (regime.__name__, f"{regime.__module__}.{regime.__name__}")
    ]


def run(case: Case, *options: str, config: Path | None = None) -> Run:
    """Train as `lit-reason fit --config RECIPE OPTIONS` does."""
    here = [] if config else [f"--vars.folder={case.folder}"]
    cli = build("fit", ["--config", str(config or case.recipe), *here, *options])
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)
    cli.run_verb()
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    progress = [value for _, value in log.points(case.regime.learns[0])]
    return Run(cli, dict(log.points("train/loss")), progress, watch.before, watch.steps)


def run_or_refusal(case: Case, setting: str, *options: str) -> Run | None:
    """A run; None where the regime says that it cannot, naming the setting."""
    try:
        return run(case, *options)
    except UserError as refused:
        assert setting in str(refused), f"refused without naming {setting}: {refused}"
        return None


@functools.cache
def whole(case: Case) -> Run:
    """The recipe as it is, with a checkpoint on the way and an export at the end."""
    saver = ["ModelCheckpoint", f"every_n_train_steps={SAVED_STEP}", "save_top_k=-1", "save_last=false"]
    callbacks = [f"--trainer.callbacks+={saver[0]}", *(f"--trainer.callbacks.{setting}" for setting in saver[1:])]
    return run(case, *callbacks, "--trainer.callbacks+=HFExport")


@functools.cache
def adapted(case: Case) -> Run | None:
    """The recipe with a low-rank adapter; None where the regime refuses one."""
    adapter = ["--model.lm.adapter.rank=4", "--model.lm.adapter.dropout=0.1"]
    return run_or_refusal(case, "adapter", *adapter, "--trainer.callbacks+=HFExport")


@functools.cache
def short(case: Case) -> Run:
    """The first steps of the recipe with settings of one's own."""
    return run(case, f"--trainer.max_steps={GOLDEN_STEPS}", *own_rate(case), "--seed_everything=7")


def own_rate(case: Case) -> list[str]:
    """A learning rate other than the recipe's, where there is one."""
    return [] if case.regime.collects else ["--model.optim.lr=0.005"]


def promise(check: Callable[[Case], None]) -> Callable[[Case], None]:
    PROMISES.append(check)
    return check


def learnt(case: Case, done: Run, share: float) -> bool:
    """Whether the last values of the regime's figure are below this share of the first, or have risen.

    A method that collects knows nothing before its end, and has one value then.
    """
    figures, few = done.progress, 1 if case.regime.collects else 4
    last = sum(figures[-few:]) / few
    return last < share * figures[0] if case.regime.learns[1] == "falls" else last > sum(figures[:few]) / few


# ---- training ----


@promise
def fits_and_learns(case: Case) -> None:
    done = whole(case)
    assert list(done.losses) == list(range(done.cli.trainer.max_steps)), "train/loss is logged at every step"
    assert learnt(case, done, 0.6), (case.regime.learns, done.progress)


@promise
def full_training_changes_every_trained_weight_and_no_other(case: Case) -> None:
    done = whole(case)
    trained = {name for name, weight in done.weights().items() if weight.requires_grad}
    if case.regime.collects:
        assert done.changed() == set() and not any(name.startswith("lm.") for name in trained)
        assert done.collected() and all(t.isfinite().all() for t in done.collected().values())
        return
    assert trained and done.changed() == trained


@promise
def an_adapter_trains_alone(case: Case) -> None:
    done = adapted(case)
    if done is None:
        return  # refused, naming the setting
    assert learnt(case, done, 0.85), (case.regime.learns, done.progress)
    if case.regime.collects:
        assert any("lora_" in name for name in done.weights()) and not done.changed()
        return
    model = {name for name in done.weights() if name.startswith("lm.")}
    adapter = {name for name in model if "lora_" in name}
    assert adapter and adapter == {name for name in model if done.weights()[name].requires_grad}
    assert done.changed() & model == adapter


@promise
def micro_batches_equal_one_batch(case: Case) -> None:
    rows = batch_rows(case)
    split = [f"--data.batch_rows={rows // 4}", "--trainer.accumulate_grad_batches=4"]
    four = run_or_refusal(case, "accumulate_grad_batches", PLAIN, "--trainer.max_steps=2", *split)
    if four is None:
        return
    once = run(case, PLAIN, "--trainer.max_steps=2")
    assert once.curve == pytest.approx(four.curve, rel=1e-4)
    assert len(once.gradients) == len(four.gradients) == 2
    for a, b in zip(once.gradients[0], four.gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(once.collected(), four.collected(), rtol=1e-3, atol=1e-4)


def batch_rows(case: Case) -> int:
    """Rows of a micro-batch in the recipe."""
    rows = yaml.safe_load(case.recipe.read_text())["data"]["init_args"]["batch_rows"]
    assert rows % 4 == 0, "the recipe's batch_rows must divide into four micro-batches"
    return rows


def in_two_processes(
    case: Case, options: list[str], strategies: tuple[str, ...]
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """One process's part: by strategy `train/loss` and the file; empty but on the first rank, which writes them."""
    found = {}
    for strategy in strategies:
        spread = ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.enable_checkpointing=false"]
        done = run(case, *options, *spread)
        found[strategy] = done.curve, done.collected() if done.curve else {}
    return found


def two_processes_equal_one(case: Case, folder: Path, *more: str) -> None:
    """Not in `PROMISES`, for it costs more than they do: a step of one process, and half of its rows in each of two."""
    rows, options = batch_rows(case), [PLAIN, "--trainer.max_steps=3", *more]
    alone = run(case, *options, f"--data.batch_rows={rows}")
    halves = [*options, f"--data.batch_rows={rows // 2}"]
    first, second = two_ranks.run(in_two_processes, folder, case, halves, ("ddp", "fsdp2"))
    assert len(alone.curve) == 3 and len(first) == 2
    for strategy, (curve, collected) in first.items():
        assert curve == pytest.approx(alone.curve, rel=1e-4), strategy
        torch.testing.assert_close(collected, alone.collected(), rtol=1e-3, atol=1e-4)


# ---- repeating ----


@promise
def the_saved_config_repeats_the_run_bit_for_bit(case: Case) -> None:
    """And with it: the same seed gives the same losses."""
    done = short(case)
    again = run(case, config=done.folder / "config.yaml")
    assert again.folder != done.folder
    assert again.losses == done.losses and len(again.losses) == GOLDEN_STEPS
    torch.testing.assert_close(again.collected(), done.collected(), rtol=0, atol=0)


@promise
def another_seed_gives_other_losses(case: Case) -> None:
    other = run(case, "--trainer.max_steps=2", *own_rate(case), "--seed_everything=8")
    assert short(case).curve[:2] != other.curve, "a seed that changes nothing: is nothing random in this recipe?"


@promise
def a_resume_within_an_epoch_is_bit_equal(case: Case) -> None:
    done = whole(case)
    assert SAVED_STEP % done.cli.trainer.num_training_batches, "the checkpoint must lie within an epoch"
    (saved,) = done.folder.glob(f"checkpoints/*step={SAVED_STEP}.ckpt")
    rest = run(case, f"--ckpt_path={saved}")
    assert rest.losses == {step: loss for step, loss in done.losses.items() if step >= SAVED_STEP}
    for name, weight in rest.weights().items():
        assert torch.equal(weight, done.weights()[name]), name
    torch.testing.assert_close(rest.collected(), done.collected(), rtol=0, atol=0)


def golden_losses(case: Case) -> list[float]:
    """Losses of the first steps without dropout, whose draws differ between torch versions."""
    return run(case, PLAIN, f"--trainer.max_steps={GOLDEN_STEPS}").curve


def write_golden(case: Case) -> None:
    """Record what `the_first_steps_are_as_recorded` compares with."""
    case.golden.write_text(json.dumps({"train/loss": golden_losses(case)}, indent=2) + "\n")


@promise
def the_first_steps_are_as_recorded(case: Case) -> None:
    assert case.golden.is_file(), f"{case.golden} is missing: run pytest tests/conformance --write-golden once"
    recorded = json.loads(case.golden.read_text())["train/loss"]
    assert len(recorded) == GOLDEN_STEPS
    assert golden_losses(case) == pytest.approx(recorded, rel=GOLDEN_TOLERANCE)


# ---- what comes out ----


@promise
def the_export_gives_equal_logits(case: Case) -> None:
    for done, tolerance in ((whole(case), 1e-6), (adapted(case), 1e-4)):  # merging an adapter rounds
        if done is None:
            continue
        theirs = AutoModelForCausalLM.from_pretrained(done.folder / "export").eval()
        ours = done.cli.model.lm.hf.eval()
        ids = torch.arange(0, ours.get_input_embeddings().num_embeddings, 3)[:48][None]
        assert ids.numel() > 10
        with torch.no_grad():
            expected = ours(input_ids=ids).logits
            torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=tolerance, atol=tolerance)
        text = done.cli.model.tokenizer.decode(ids[0])
        tokenizer = AutoTokenizer.from_pretrained(done.folder / "export")
        assert tokenizer(text).input_ids == done.cli.model.tokenizer(text).input_ids != []


# ---- how it is written ----


def own_settings(case: Case, known: set[tuple[type, str]]) -> Iterator[str]:
    """Dotted names of the settings that this regime has beyond every regime's.

    Of a class of settings whose keys another regime was asked for already (`known`), one key stands for all.
    """
    hints = typing.get_type_hints(case.regime.__init__)
    for name in inspect.signature(case.regime.__init__).parameters:
        if name not in BASE_ARGUMENTS:
            yield name
            if dataclasses.is_dataclass(cls := hints.get(name)):
                keys = [field.name for field in dataclasses.fields(cls) if len(field.name) > 3]
                asked = [key for key in keys if (cls, key) not in known] or keys[:1]
                known.update((cls, key) for key in asked)
                yield from (f"{name}.{key}" for key in asked)


@promise
def a_misspelt_key_gives_the_nearest_match(case: Case) -> None:
    of_all = [] if case.regime.collects else ["optim", "optim.schedule"]
    for setting in ["lm.attention", *of_all, *(s for s in own_settings(case, ASKED) if len(s) > 3)]:
        *above, key = setting.split(".")
        recipe = yaml.safe_load(case.recipe.read_text())
        node = recipe["model"]["init_args"]
        for part in above:
            node = node.setdefault(part, {})
        node[key[:1] + key[2:]] = node.pop(key, None)
        wrong = case.folder / "misspelt.yaml"
        wrong.write_text(yaml.safe_dump(recipe))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = door.main(["fit", "--config", str(wrong)])
        assert code == 2 and f"did you mean '{key}'" in err.getvalue(), (setting, code, err.getvalue())


def undocumented(cls: type) -> list[str]:
    """Arguments of a class that have no line of their own under `Args:` in its docstring."""
    text = (inspect.getdoc(cls) or "").partition("Args:")[2]
    names = [name for name in inspect.signature(cls).parameters if name != "self"]
    return [f"{cls.__name__}.{name}" for name in names if not re.search(rf"^    {name}: \S", text, re.MULTILINE)]


@promise
def every_setting_has_a_line_in_the_docstring(case: Case) -> None:
    hints = typing.get_type_hints(case.regime.__init__)
    configs = [cls for cls in hints.values() if dataclasses.is_dataclass(cls)]
    assert configs
    assert [name for cls in (case.regime, *configs) for name in undocumented(cls)] == []


@promise
def the_regime_file_is_short(case: Case) -> None:
    lines = len(Path(inspect.getfile(case.regime)).read_text().splitlines())
    assert lines < MOST_LINES, f"{lines} lines: put the loss in loss.py and settings in config.py"


@promise
def the_recipe_explains_itself_and_names_the_regime(case: Case) -> None:
    header = read_header(case.recipe.read_text())
    assert header_problems(Recipe(f"smoke/{case.name}", case.recipe, **header)) == []
    assert recipes_of(case.regime, case.recipe.parent)
