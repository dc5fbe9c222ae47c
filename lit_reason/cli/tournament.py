"""`lit-reason tournament --config STUDY`: train every arm of a study under equal conditions, and compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.config_files import read_config
from lit_reason.cli.recipes import locate
from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.studies.plan import Study
    from lit_reason.studies.results import CellResult

EPILOG = """\
A study file lists a recipe, arms (options of `lit-reason fit`), tasks, seeds and budgets. Every arm is trained
with every seed: under `epochs` as long as the recipe says, under `tokens` on as many trained tokens as the
reference arm took. Killed at any moment, the same command goes on: finished runs are not repeated.

Examples
  lit-reason tournament --config studies/epic --out runs/epic
  lit-reason tournament --config my_study.yaml --workers 2"""


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(
        "tournament", "Train every arm of a study under equal conditions, and compare them.", epilog=EPILOG
    )
    parser.add_argument("--config", required=True, metavar="STUDY", help="a study file, or the name of a packaged one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for everything (default: runs/ and its name)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--check", action="store_true", help="check the options of every arm, and train nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after `tournament`; default: those of the process.

    Returns:
        0.

    Raises:
        UserError: the study file or an arm's options are wrong.
    """
    args = build_parser().parse_args(argv)
    if args.workers < 1:
        raise UserError(f"tournament: --workers is {args.workers}; at least 1 is needed")
    path = locate(args.config)
    out: Path = (args.out or Path("runs") / path.stem).resolve()
    study = load(path)
    check(study, out)
    if args.check:
        return 0
    from lit_reason.studies.page import write_outcome

    command = f"lit-reason tournament --config {args.config}"
    prepare(study, out)
    results: list[CellResult] = []
    for result in run(study, out, args.workers):
        results.append(result)
        write_outcome(study, results, out, command=command, page=False)
    text = write_outcome(study, results, out, command=command)
    print(text)
    print(f"report  {out / 'report.html'}\nfigures {out / 'results.json'}")
    return 0


def load(path: Path) -> Study:
    """Read a study file; its recipe becomes a path.

    Args:
        path: the file.

    Raises:
        UserError: the file or the recipe is missing or malformed.
    """
    from dataclasses import replace

    from lit_reason.studies.plan import read_study

    read_config(path)  # refuses what YAML lets through, with the line
    study = read_study(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    return replace(study, recipe=str(locate(study.recipe)), name=study.name or path.stem)


def check(study: Study, out: Path) -> None:
    """Check the options of every arm on its first task, and of every task with the reference.

    Args:
        study: the study.
        out: its folder; nothing is written.

    Raises:
        UserError: names the arm.
    """
    from lit_reason.cli.tournament_cell import check_cell
    from lit_reason.studies.plan import cells
    from lit_reason.tasks.generated import task_config

    for task in study.tasks.values():
        if task.problems:
            task_config(task.problems.kind, task.problems.settings)
    seen = set()
    for cell in cells(study):
        what = ("task", cell.task) if cell.arm == study.reference else ("arm", cell.arm)
        if what not in seen:
            check_cell(study, cell, out)
            seen.add(what)


def prepare(study: Study, out: Path) -> None:
    """Write generated problems, the same for all seeds, and an untrained student for each seed.

    Args:
        study: the study.
        out: its folder.
    """
    from lit_reason.cli.tournament_cell import problem_folder
    from lit_reason.tasks.generated import prepare as write_problems
    from lit_reason.tasks.generated import task_config, write_base

    for name, task in study.tasks.items():
        folder, problems = problem_folder(study, name, out), task.problems
        if folder is None or problems is None:
            continue
        write_problems(folder / "data", problems.kind, problems.settings, problems.rows, problems.held_out)
        if problems.base:
            sizes = {**problems.settings, **problems.base.settings}
            write_problems(folder / "base-data", problems.kind, sizes, problems.base.rows, problems.held_out)
        config = task_config(problems.kind, problems.settings)
        for seed in study.seeds:
            if not (folder / f"base-{seed}").is_dir():
                write_base(folder / f"base-{seed}", problems.kind, config, seed)


def run(study: Study, out: Path, workers: int = 1) -> Iterator[CellResult]:
    """Train what is not finished; yields every cell's result as it becomes known.

    Cells of one seed and budget are independent and may run side by side; equal tokens need the reference's run under
    epochs, and so wait for it.

    Args:
        study: the study.
        out: its folder.
        workers: processes; 1 trains in this one.
    """
    from lit_reason.cli.tournament_cell import run_cell
    from lit_reason.studies.plan import cells

    todo = cells(study)
    tokens: dict[tuple[str, int], int] = {}
    number = 0
    for _, wave in groupby(todo, key=lambda cell: (cell.seed, cell.budget)):
        jobs = []
        for cell in wave:
            number += 1
            budget = tokens[cell.task, cell.seed] if cell.budget == "tokens" else None
            jobs.append((study, cell, out, budget, f"{number}/{len(todo)} {cell}"))
        for result in _side_by_side(run_cell, jobs, workers):
            if result.arm == study.reference and result.budget == "epochs":
                tokens[result.task, result.seed] = _counted(result)
            print(line(study, result), flush=True)
            yield result


def _counted(result: CellResult) -> int:
    if result.trained_tokens is None:
        raise UserError("budget tokens: the recipe needs the callback Throughput, which counts trained tokens")
    return round(result.trained_tokens)


def _side_by_side(work: Callable[..., CellResult], jobs: Sequence[tuple], workers: int) -> Iterator[CellResult]:
    if workers == 1:
        yield from (work(*job) for job in jobs)
        return
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def line(study: Study, result: CellResult) -> str:
    """One finished cell in a line.

    Args:
        study: gives the score.
        result: the cell.
    """
    score = result.figures.get(study.score)
    shown = "no score" if score is None else f"{study.score} {score:.3f}"
    cost = (
        "" if result.cpu_seconds is None else f"  {result.trained_tokens:,.0f} tokens  {result.cpu_seconds:.1f} CPU s"
    )
    return f"{result.cell!s:<48} {shown}{cost}"
