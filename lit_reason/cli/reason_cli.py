"""The verbs that need a trainer: `fit`, `validate`, `test`, `predict` and `evaluate`, on LightningCLI."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_reason.cli.config_files import check_variables, resolve_names, sources
from lit_reason.cli.doctor import OPTIONAL
from lit_reason.cli.messages import Walker, chosen_classes, dropped_settings, explain, listed
from lit_reason.cli.schema import recipe_schema
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError, did_you_mean

VERBS = ("fit", "validate", "test", "predict", "evaluate")
SCANNED = (
    "lit_reason.regimes",
    "lit_reason.callbacks",
    "lit_reason.data.datamodule",
    "lit_reason.data.text.datamodule",
    "lit_reason.data.unlearning.datamodule",
    "lit_reason.data.labelled.datamodule",
    "lit_reason.envs",
    "lit_reason.rewards.classifier",
    "lit_reason.rewards.planted",
)
HANDED_OVER = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
CHECKPOINT_WORDS = ("best", "last", "hpc")
WRITTEN_BY_A_RUN = "# lightning.pytorch=="


def import_choices(names: Sequence[str] = SCANNED) -> None:
    """Import every module that may hold a class for a recipe, so that its short name works in `class_path`.

    Args:
        names: modules and packages; packages are walked.
    """
    for name in names:
        module = importlib.import_module(name)
        for path in getattr(module, "__path__", []):
            if not Path(path).is_dir():
                continue
            for found in pkgutil.walk_packages([path], prefix=f"{name}."):
                importlib.import_module(found.name)


class SaveRunConfig(SaveConfigCallback):
    """Writes the full configuration as `config.yaml` into the run folder, with or without a logger.

    Args:
        parser: the parser that read it.
        config: the parsed configuration.
        kwargs: as in Lightning's callback.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, **{"overwrite": True, "save_to_log_dir": False, **kwargs})
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder on every rank (the trainer broadcasts it), then write on the first."""
        self.folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; `lit-reason VERB --config RUN/config.yaml` repeats the run.

        Raises:
            UserError: a file of that name is there which no run has written.
        """
        target = self.folder / self.config_filename
        if target.is_file() and not target.read_text(errors="replace").startswith(WRITTEN_BY_A_RUN):
            raise UserError(
                f"{target}: a run keeps its whole recipe there, and this file is your own; give the run a folder "
                "(trainer.default_root_dir or a logger), or rename the file"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        if "resume" in config:
            config["resume"] = None  # to repeat a run is not to go on with it
        self.parser.save(
            config,
            str(target),
            skip_none=False,
            overwrite=True,
            multifile=False,
        )


class RecipeParser(LightningArgumentParser):
    """Takes no abbreviations, neither of its own options nor of those of a class: `--data.condense.ta` is misspelt.

    Args:
        args: as in Lightning's parser.
        kwargs: as in Lightning's parser.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse. jsonargparse hands a nested option to the parser of its class as text, and null as `None`."""
        if getattr(self, "_inner_parser", False) and args:
            args = [f"{word.removesuffix('=None')}=null" if word.endswith("=None") else word for word in args]
        return super().parse_args(args, *rest, **kwargs)


class ReasonCLI(LightningCLI):
    """One verb's command line: any regime as `model`, any datamodule as `data`, and `vars` for own numbers.

    Each verb has a flat parser of its own. So interpolation sees the whole configuration, later files and
    command-line options included, and a saved `config.yaml` reads back as it is.

    Args:
        verb: trainer method to run.
        argv: its arguments.
        trainer_class: the trainer.
        regime_class: base class of what `model` may be.
        with_trainer: build the trainer, its callbacks and loggers too; without, the whole configuration is
            still read and checked.
    """

    def __init__(
        self,
        verb: str,
        argv: Sequence[str],
        trainer_class: type[Trainer],
        regime_class: type[LightningModule],
        with_trainer: bool = True,
    ) -> None:
        self.verb, self.with_trainer = verb, with_trainer
        self.classes = trainer_class, regime_class
        self.verb_arguments: list[str] = []
        super().__init__(
            regime_class,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            trainer_class=trainer_class,
            parser_class=RecipeParser,
            seed_everything_default=0,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "prog": f"lit-reason {verb}",
                "description": (inspect.getdoc(getattr(trainer_class, verb)) or "").partition("\n")[0],
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(argv),
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--vars` and the verb's own arguments, as the trainer's method documents them."""
        parser.add_argument("--vars", type=dict, default={}, help="your own numbers, read with ${vars.name}")
        method = inspect.signature(getattr(self.trainer_class, self.verb))
        skip: set[Any] = HANDED_OVER & set(method.parameters)
        self.verb_arguments = parser.add_method_arguments(self.trainer_class, self.verb, skip=skip)
        of_fit = set(inspect.signature(self.classes[0].fit).parameters) - HANDED_OVER - {"self"}
        self.foreign_arguments = sorted(of_fit - set(self.verb_arguments))
        for name in self.foreign_arguments:  # so that every verb reads the config.yaml that a fit leaves
            parser.add_argument(f"--{name}", type=Any, default=None, help=f"of fit; {self.verb} does not take it")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and turn a refusal into one short message."""
        self.given = given = sources(args)
        check_variables(given)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
                super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise explain(error, given, self.recipe_schema(), args) from error
        except Exception as error:
            if type(error).__module__.startswith("omegaconf"):
                raise explain(error, given, self.recipe_schema(), args) from error
            raise
        for name in self.foreign_arguments:
            if self.config[name] is not None:
                raise UserError(f"{name}: {self.verb} does not take it; give --{name}=null to leave it out")
        self._check_checkpoint(self.config.get("ckpt_path"))
        switched = any(len(names) > 1 for names in chosen_classes(given).values())
        if switched and os.environ.get("LOCAL_RANK", "0") == "0":
            for note in dropped_settings(given, self.recipe_schema()):
                print(f"lit-reason: note: {note}", file=sys.stderr)

    def _dump_config(self) -> None:
        """Settings for a class that calls `save_hyperparameters`. Lightning writes YAML and reads it again for that."""
        self.config_dump = self.config.as_dict()  # a fifth of the time that it takes to build a run

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what a class refuses with a UserError comes through as that."""
        try:
            if self.with_trainer:
                super().instantiate_classes()
            else:
                config = self.config.clone()
                config.pop("trainer", None)
                self.config_init = self.parser.instantiate_classes(config)
                self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
        except (ValueError, TypeError) as error:
            cause = _user_error(error)
            if cause:
                raise cause from error
            problem = Walker(self.recipe_schema()).first_problem(self.given)
            if problem:  # the parser lets some values through, such as a number where a block belongs
                raise UserError(str(problem)) from error
            missing = _missing_package(str(error))
            if missing:
                raise UserError(missing) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it refuses is a setting of `trainer`."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            cause = _user_error(error)
            raise cause or UserError(_trainer_message(error)) from error

    def recipe_schema(self) -> dict[str, Any]:
        """JSON Schema of the recipes this command line accepts."""
        return schema_for(*self.classes, ["fit", self.verb])

    @staticmethod
    def _check_checkpoint(path: Any) -> None:
        if path is None or path in CHECKPOINT_WORDS or "://" in str(path) or Path(path).is_file():
            return
        if (Path(path) / ".metadata").is_file():  # shards
            return
        if Path(path).is_dir():
            inside = sorted(item.relative_to(path).as_posix() for item in Path(path).rglob("*.ckpt"))
            raise UserError(f"ckpt_path: {path} is a folder; checkpoints in it: {listed(inside) or 'none'}")
        folder = Path(path).parent
        beside = sorted(item.name for item in folder.glob("*.ckpt")) if folder.is_dir() else []
        near = did_you_mean(Path(path).name, beside) or (f"; there: {', '.join(beside[:5])}" if beside else "")
        raise UserError(f"ckpt_path: no such checkpoint: {path}{near}; or one of {', '.join(CHECKPOINT_WORDS)}")

    def run_verb(self) -> Any:
        """Run the trainer's method with the built model and data."""
        arguments = {name: self.config_init[name] for name in self.verb_arguments}
        if arguments.get("resume"):
            trainer: Any = self.trainer
            trainer.recipe = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return getattr(self.trainer, self.verb)(model=self.model, datamodule=self.datamodule, **arguments)


def _user_error(error: BaseException | None) -> UserError | None:
    """The error meant for the user behind what the parser made of it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def _missing_package(text: str) -> str | None:
    """How to get the package that a class of the recipe, such as a logger, asked for; None for another error."""
    asked = re.search(r"Requirement '([\w-]+)|No module named '([\w-]+)", text)
    if not asked:
        return None
    name = asked[1] or asked[2]
    extra = next((extra for package, extra, _ in OPTIONAL if package == name), None)
    wanted = f"'lit-reason[{extra}]'" if extra else name
    return f"{name} is not installed: pip install {wanted}"


def _trainer_message(error: Exception) -> str:
    """What Lightning's trainer refused, with the nearest name it would have taken."""
    text = " ".join(str(error).split())
    named = re.search(r"`(accelerator|strategy)='(\w+)'`", text)
    if not named:
        return f"trainer: {text}"
    part, given = named.groups()
    known = AcceleratorRegistry.available_accelerators() if part == "accelerator" else StrategyRegistry.keys()
    names = ["auto", *sorted(known)]
    return f"trainer.{part}: no {part} is called {given!r}{did_you_mean(given, names)}; known: {listed(names, given)}"


def schema_for(
    trainer_class: type[Trainer], regime_class: type[LightningModule], verbs: Sequence[str] = VERBS
) -> dict[str, Any]:
    """JSON Schema of recipes for a trainer and a family of regimes.

    Args:
        trainer_class: the trainer.
        regime_class: base class of what `model` may be.
        verbs: trainer methods whose arguments are top-level keys.
    """
    sections = {"trainer": trainer_class, "model": (regime_class,), "data": (LightningDataModule,)}
    return recipe_schema(sections, [getattr(trainer_class, verb) for verb in verbs])


class _NoAdvertising(logging.Filter):
    """Drops Lightning's tips for other products."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("litlogger" in text or "litmodels" in text)


# Warnings about the insides of lightning and transformers, or about what this project does on purpose.
_NOT_FOR_USERS = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    "Total length of `list` across ranks is zero.*",  # no validation rows
    ".*is_gradient_checkpointing. is deprecated.*",
    ".*configure_optimizers. returned .None.*",  # a method that collects optimises nothing
    ".*does not have many workers.*",  # rows come from a memory map
)


def _quiet_lightning() -> None:
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    # Without 4-bit weights it is nothing to the user that bitsandbytes found no faster kernel for them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _NoAdvertising) for known in logger.filters):
            logger.addFilter(_NoAdvertising())


def house_classes() -> tuple[type[Trainer], type[LightningModule]]:
    """The trainer and the regime base class, with every choice imported."""
    from lit_reason.core.regime import Regime
    from lit_reason.core.trainer import ReasonTrainer

    import_choices()
    return ReasonTrainer, Regime


def build(verb: str, argv: Sequence[str], *, with_trainer: bool = True) -> ReasonCLI:
    """Parse and build model, data and trainer without running anything.

    Args:
        verb: one of `VERBS`.
        argv: arguments after the verb; packaged recipe names are fine after `--config`.
        with_trainer: False leaves the trainer, its callbacks and loggers out.

    Raises:
        UserError: the configuration is wrong.
    """
    _quiet_lightning()
    argv = resolve_names(argv)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # at the end, so that a class of the user's own is found and nothing is hidden
    trainer_class, regime_class = house_classes()
    return ReasonCLI(verb, argv, trainer_class, regime_class, with_trainer)


def main(argv: Sequence[str]) -> int:
    """Run one verb.

    Args:
        argv: the verb and its arguments.

    Returns:
        Exit code 0; failures are raised and turned into messages by the front door.
    """
    verb, *rest = argv
    build(verb, rest).run_verb()
    return 0
