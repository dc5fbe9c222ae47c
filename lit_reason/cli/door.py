"""The front door: the program `lit-reason`. It imports little, until a verb needs more.

Exit codes: 0 done, 1 the machine failed (disk, permissions), 2 what the user gave is wrong, 130 interrupted,
143 told to stop (SIGTERM); a defect of the program itself ends with a traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from lit_reason import __version__
from lit_reason.errors import UserError, did_you_mean

TRAINER_VERBS = {
    "fit": "train",
    "validate": "loss and verified generation on held-out rows",
    "test": "the same on test rows",
    "predict": "answer prompts and write the completions to a file",
    "evaluate": "pass@k with intervals, by generating and checking answers",
}
OTHER_VERBS = {
    "tournament": "train the arms of a study under equal conditions, and compare them",
    "demo": "train full and condensed traces side by side, and compare them",
    "plan": "what a run will need in memory, before it starts",
    "inspect": "rows as the loss sees them, span by span, and what is wrong with them",
    "launch": "a script that starts a run on several machines",
    "consolidate": "one file of a checkpoint folder that several processes wrote",
    "condense": "shorten the reasoning traces of a file",
    "edges": "which part of the traces carries the answer: head, middle or tail",
    "demonstrate": "dialogues of an environment's expert, as rows to train on",
    "verify-rollouts": "check recorded rollouts, and compare them with a model",
    "new": "write the files of a new training method",
    "list": "the recipes that come with the program",
    "show": "print a recipe",
    "doctor": "versions, devices, and what is missing",
    "schema": "a JSON schema of recipes, for editors",
    "completion": "a completion script for bash, zsh or fish",
}
GROUPS = (
    ("Run a recipe", tuple(TRAINER_VERBS)),
    ("Start here", ("demo", "list", "show", "plan", "doctor")),
    ("Compare", ("tournament",)),
    ("Data", ("inspect", "condense", "edges", "demonstrate", "verify-rollouts")),
    ("Many processes", ("launch", "consolidate")),
    ("Extend", ("new",)),
    ("Comfort", ("schema", "completion")),
)
VERBS = {**TRAINER_VERBS, **OTHER_VERBS}
MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
}
# torch and safetensors wrap a full disk in errors of their own
FULL_DISK = ("PytorchStreamWriter failed", "iostream error", "unexpected pos", "No space left on device")
EXAMPLES = """\
Examples
  lit-reason demo
  lit-reason fit --config sft/smollm2-epic --data.train_file my_traces.jsonl
  lit-reason fit --config base.yaml --config mine.yaml --trainer.max_steps 100
  lit-reason inspect --config sft/smollm2-epic --data.train_file my_traces.jsonl
  lit-reason condense in.jsonl out.jsonl --tau 0.5

Every verb explains itself with --help. `--config` takes a file or the name of a recipe, and may be repeated:
later files win, and options win over files."""


def module_of(verb: str) -> str:
    """The module of a verb that needs no trainer.

    Args:
        verb: one of `OTHER_VERBS`.
    """
    return f"lit_reason.cli.{verb.replace('-', '_')}"


def help_text() -> str:
    """What `lit-reason --help` prints."""
    lines = [
        f"lit-reason {__version__}: train language models to reason",
        "",
        "Usage: lit-reason VERB [options]",
        "",
    ]
    for title, verbs in GROUPS:
        lines.append(title)
        lines += [f"  {verb:<12}{VERBS[verb]}" for verb in verbs]
        lines.append("")
    return "\n".join([*lines, EXAMPLES])


def list_recipes(argv: Sequence[str]) -> int:
    """`list [WORD]`: recipes with their purpose, all or those whose name or purpose has the word."""
    from lit_reason.cli.recipes import find_recipes

    if argv and argv[0].startswith("-"):
        print("Usage: lit-reason list [WORD]\n\nThe packaged recipes, all or those that mention WORD.")
        return 0
    word = " ".join(argv).lower()
    chosen = [r for r in [*find_recipes(), *find_recipes(studies=True)] if word in f"{r.name} {r.purpose}".lower()]
    if not chosen:
        raise UserError(f"no recipe mentions {word!r}" if word else "no recipes are installed")
    width = max(len(recipe.name) for recipe in chosen) + 2
    folder = None
    for recipe in chosen:
        if folder is not None and recipe.folder != folder:
            print()
        folder = recipe.folder
        print(f"{recipe.name:<{width}}{recipe.purpose}")
    return 0


def show_recipe(argv: Sequence[str]) -> int:
    """`show RECIPE`: print the file, by path or packaged name."""
    from lit_reason.cli.recipes import locate

    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print("Usage: lit-reason show RECIPE\n\nPrint a recipe: a file, or a name from `lit-reason list`.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    sys.stdout.write(locate(argv[0]).read_text(encoding="utf-8"))
    return 0


def run_trainer_verb(argv: Sequence[str]) -> int:
    """Check the config files in a moment, then import the rest and run the verb."""
    from lit_reason.cli.config_files import check_variables, resolve_names, sources

    verb, *rest = argv
    rest = resolve_names(rest)
    check_variables(sources(rest))
    return importlib.import_module("lit_reason.cli.reason_cli").main([verb, *rest])


def dispatch(argv: Sequence[str]) -> int:
    """Run the verb that the first argument names.

    Args:
        argv: arguments without the program's name.

    Raises:
        UserError: no such verb.
    """
    verb, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb in ("-V", "--version", "version"):
        print(f"lit-reason {__version__}")
        return 0
    if verb in TRAINER_VERBS:
        return run_trainer_verb([verb, *rest])
    here: dict[str, Callable[[Sequence[str]], int]] = {"list": list_recipes, "show": show_recipe}
    if verb in here:
        return here[verb](rest)
    if verb in OTHER_VERBS:
        return importlib.import_module(module_of(verb)).main(rest) or 0
    if verb.startswith("-"):
        raise UserError(f"the verb comes first: lit-reason VERB {verb} ...; verbs: {', '.join(VERBS)}")
    raise UserError(f"no verb {verb!r}{did_you_mean(verb, VERBS)}; verbs: {', '.join(VERBS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The program.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code. Set LIT_REASON_TRACEBACK=1 to see where a user error arose.
    """
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _say(error, str(error), 2)
    except KeyboardInterrupt:
        print("lit-reason: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception as error:
        message = machine_message(error)
        if message is None:
            raise
        return _say(error, message, 1)


def _say(error: BaseException, message: str, code: int) -> int:
    """Print a message instead of a traceback, unless the traceback is asked for."""
    if os.environ.get("LIT_REASON_TRACEBACK", "0") not in ("", "0"):
        raise error
    print(f"lit-reason: {message}", file=sys.stderr)
    return code


def _exit_code(stop: SystemExit) -> int:
    """Lightning exits with 1 after Ctrl-C and with 0 after SIGTERM; a scheduler must see which it was."""
    if type(stop).__name__ == "SIGTERMException":
        print("lit-reason: stopped by SIGTERM", file=sys.stderr)
        return 143
    if isinstance(stop.__context__, KeyboardInterrupt):
        print("lit-reason: interrupted", file=sys.stderr)
        return 130
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def machine_message(error: Exception) -> str | None:
    """One line for a failure of the machine rather than of the program; None for anything else.

    Args:
        error: what was raised.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        name = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{name}"
    if any(phrase in text for phrase in FULL_DISK):
        return f"could not write a file, most likely because the disk is full ({text.splitlines()[0]})"
    if type(error).__name__ == "MisconfigurationException":
        return text.splitlines()[0]
    return None
