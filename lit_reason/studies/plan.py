"""What a study is: tasks, arms, budgets and seeds, and the runs that follow from them.

A study file holds plain values, and every setting of a run in it is an option of `lit-reason fit`. Nothing here
knows what the arms differ in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from lit_reason.errors import UserError, did_you_mean

Options = Mapping[str, Any]
BASE = "base"
BUDGETS = {
    "epochs": "every arm runs as long as its recipe says",
    "tokens": "every arm takes as many trained tokens as the reference arm did under `epochs`",
}


@dataclass(frozen=True)
class Base:
    """A run before all arms, one for each seed: every arm starts from the weights it leaves.

    It trains on problems of the same kind but of other sizes, so that the student knows the single steps of a
    derivation before it meets the traces that the arms differ in. Its cost is no arm's.

    Args:
        rows: problems to train on.
        settings: sizes that differ from those of the task.
        options: options of `fit` for this run.
    """

    rows: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Problems:
    """A generated task on which every run of a study trains and is checked.

    Args:
        kind: module in `lit_reason.tasks`: `chain` or `search`.
        rows: problems to train on.
        held_out: problems to check on.
        settings: sizes that differ from the task's own defaults.
        base: a run before all arms; default: they start from random weights.
    """

    kind: str
    rows: int
    held_out: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Base | None = None


@dataclass(frozen=True)
class StudyTask:
    """Data on which all arms are compared.

    Args:
        problems: generated problems; the recipe finds them in `${vars.folder}/data` and an untrained student in
            `${vars.folder}/base`. Without, the recipe names data and model itself.
        options: options of `fit` for this task.
        at: where the task stands on an axis, for a curve over tasks.
    """

    problems: Problems | None = None
    options: Options = field(default_factory=dict)
    at: float | None = None


@dataclass(frozen=True)
class Stage:
    """One of the runs of an arm.

    Args:
        share: share of the arm's budget.
        options: options of `fit`.
    """

    share: float = 1.0
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Args:
        options: options of `fit`, for all stages.
        stages: runs one after the other, each on the weights the one before left (its export). Shares need not
            add up to 1: a single stage of 0.7 is the arm stopped early.
        budgets: budgets under which the arm runs; default: all of the study's.
        tasks: tasks on which it runs; default: all.
        series: name of the curve it is a point of, and
        at: its place on that curve's axis.
    """

    options: Options = field(default_factory=dict)
    stages: tuple[Stage, ...] = (Stage(),)
    budgets: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    series: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Study:
    """A study.

    Args:
        recipe: file or name of the recipe behind all runs.
        arms: what is compared, by name.
        reference: the arm that the others are compared with; default: the first.
        tasks: by name; default: one task named `task`, on the recipe's own data.
        options: options of `fit` for all runs.
        seeds: one run each.
        budgets: see `BUDGETS`.
        score: metric in `metrics.csv` by which arms are compared; where `<score>_low` and `_high` are there, they
            are its interval.
        columns: further columns of the table: heading to metric. A metric of training (`train/...`) is the mean of
            its last five logged values, any other its last value.
        threads: torch's threads in each run; default: torch's own choice.
        name: title of the page; default: the name of the file.
        axis: what `at` of the arms counts.
        task_axis: what `at` of the tasks counts.
    """

    recipe: str
    arms: Mapping[str, Arm]
    reference: str = ""
    tasks: Mapping[str, StudyTask] = field(default_factory=lambda: {"task": StudyTask()})
    options: Options = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[str, ...] = ("epochs",)
    score: str = "val/pass@1"
    columns: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    name: str = ""
    axis: str = ""
    task_axis: str = ""


@dataclass(frozen=True, order=True)
class Cell:
    """One place in the table of a study: an arm, on a task, under a budget, with a seed."""

    task: str
    budget: str
    arm: str
    seed: int

    @property
    def folder(self) -> str:
        """Where its runs lie under the study's folder."""
        return f"{self.task}/{self.budget}/{self.arm}/seed-{self.seed}"

    @property
    def is_base(self) -> bool:
        """Whether it is the run from which the arms start, and no arm itself."""
        return self.budget == BASE

    def __str__(self) -> str:
        return f"{self.task}, {'' if self.is_base else 'equal '}{self.budget}, {self.arm}, seed {self.seed}"


def read_study(values: Mapping[str, Any], where: str) -> Study:
    """A study from the plain values of its file.

    Args:
        values: as from YAML.
        where: name of the file, for messages.

    Raises:
        UserError: a key that does not exist, a value of the wrong kind, or names that fit nothing.
    """
    made = _record(Study, values, where)
    arms = {name: _arm(arm, f"{where}: arms.{name}") for name, arm in _named(made.arms, f"{where}: arms").items()}
    tasks = {
        name: _task(task, f"{where}: tasks.{name}") for name, task in _named(made.tasks, f"{where}: tasks").items()
    }
    study = Study(
        **{
            **vars(made),
            "arms": arms,
            "tasks": tasks,
            "reference": made.reference or next(iter(arms)),
            "seeds": tuple(_several(made.seeds, f"{where}: seeds")),
            "budgets": tuple(_several(made.budgets, f"{where}: budgets")),
            "columns": _named(made.columns, f"{where}: columns") if made.columns else {},
        }
    )
    _check(study, where)
    return study


def _check(study: Study, where: str) -> None:
    _known("reference", [study.reference], study.arms, where)
    _known("budgets", study.budgets, BUDGETS, where)
    for name, arm in study.arms.items():
        _known(f"arms.{name}.budgets", arm.budgets or (), study.budgets, where)
        _known(f"arms.{name}.tasks", arm.tasks or (), study.tasks, where)
        if not arm.stages or not all(0 < stage.share <= 1 for stage in arm.stages):
            raise UserError(f"{where}: arms.{name}.stages: shares lie above 0 and are at most 1")
    for seed in study.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"{where}: seeds: {seed!r} is no whole number of 0 or more")
    for group in (study.arms, study.tasks):
        for name in group:
            if "/" in name or name.startswith("."):
                raise UserError(f"{where}: {name!r} names a folder, so it holds no slash and does not start with a dot")
    if "tokens" not in study.budgets:
        return
    if "epochs" not in study.budgets or study.arms[study.reference].budgets == ("tokens",):
        raise UserError(f"{where}: budget tokens is measured on the reference under epochs: list epochs as well")
    for task in study.tasks:
        if not runs_on(study.arms[study.reference], task):
            raise UserError(f"{where}: budget tokens: the reference '{study.reference}' does not run on task {task}")


def runs_on(arm: Arm, task: str) -> bool:
    """Whether an arm takes part on a task."""
    return arm.tasks is None or task in arm.tasks


def cells(study: Study) -> list[Cell]:
    """All runs, in an order in which each stands behind what it depends on; a seed is complete before the next.

    Under `tokens` the reference is its run under `epochs`, so it is not listed again.
    """
    arms = sorted(study.arms, key=lambda name: name != study.reference)
    found = []
    for seed in study.seeds:
        found += [Cell(task, BASE, BASE, seed) for task in study.tasks if base_of(study, task)]
        found += [
            Cell(task, budget, arm, seed)
            for budget in sorted(study.budgets)  # epochs before tokens
            for task in study.tasks
            for arm in arms
            if runs_on(study.arms[arm], task)
            and budget in (study.arms[arm].budgets or study.budgets)
            and not (budget == "tokens" and arm == study.reference)
        ]
    return found


def base_of(study: Study, task: str) -> Base | None:
    """The run before all arms on a task, if there is one."""
    problems = study.tasks[task].problems
    return problems.base if problems else None


def arm_of(study: Study, cell: Cell) -> Arm:
    """What is trained in a cell."""
    base = base_of(study, cell.task)
    return Arm(base.options) if cell.is_base and base else study.arms[cell.arm]


def options(study: Study, cell: Cell, stage: Stage) -> dict[str, Any]:
    """The options of one run; of equal names the later holds: study, task, arm, stage.

    Args:
        study: the study.
        cell: which of its runs.
        stage: which stage of the arm.
    """
    return {**study.options, **study.tasks[cell.task].options, **arm_of(study, cell).options, **stage.options}


# ---- plain values to records ------------------------------------------------------------------------------


def _arm(values: Any, where: str) -> Arm:
    arm = _record(Arm, values or {}, where)
    stages = tuple(_record(Stage, stage, f"{where}.stages") for stage in _several(arm.stages, f"{where}.stages"))
    lists = {
        name: None if (given := getattr(arm, name)) is None else tuple(_several(given, f"{where}.{name}"))
        for name in ("budgets", "tasks")
    }
    return Arm(**{**vars(arm), "stages": stages, **lists})


def _task(values: Any, where: str) -> StudyTask:
    task = _record(StudyTask, values or {}, where)
    if task.problems is None:
        return task
    problems = _record(Problems, task.problems, f"{where}.problems")
    if problems.base is not None:
        problems = replace(problems, base=_record(Base, problems.base, f"{where}.problems.base"))
    return StudyTask(problems, task.options, task.at)


def _record(kind: type, values: Any, where: str) -> Any:
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {values!r} stands where a mapping belongs")
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(f"{where}: no key '{key}'{did_you_mean(str(key), known)}; keys: {', '.join(known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}: '{name}' is missing")
    if "options" in values:
        _named(values["options"] or {}, f"{where}: options")
        values = {**values, "options": values["options"] or {}}
    return kind(**values)


def _named(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where}: {values!r} stands where a mapping with names as keys belongs")
    return dict(values)


def _several(values: Any, where: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{where}: {values!r} stands where a list of at least one belongs")
    if len({repr(value) for value in values}) < len(values) and "stages" not in where:
        raise UserError(f"{where}: {values!r} names something twice")
    return values


def _known(key: str, given: Sequence[str], allowed: Mapping[str, Any] | Sequence[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise UserError(
                f"{where}: {key}: '{name}'{did_you_mean(str(name), allowed)}; there are {', '.join(allowed)}"
            )
