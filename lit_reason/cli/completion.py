"""`lit-reason completion SHELL`: a static completion script, so that pressing tab never starts Python.

Verbs, recipe names and the common options are in the script. With `--full` it also holds every dotted option
of the trainer, the regimes and the datamodules (`--trainer.max_steps`, `--data.condense.tau`, ...); making it
then takes some seconds, using it does not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.door import OTHER_VERBS, TRAINER_VERBS, VERBS, module_of
from lit_reason.cli.recipes import find_recipes

COMMON = ("--config", "--print_config", "--help", "--ckpt_path", "--seed_everything", "--model", "--data")
LIKE_FIT = (*TRAINER_VERBS, "plan")  # verbs that take a recipe and its options
SHELLS = ("bash", "zsh", "fish")

BASH = r"""
_lit_reason() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
  local verb="${COMP_WORDS[1]}" options="--help" recipes="@RECIPES@"
  COMPREPLY=()
  case "$verb" in
    @TRAINER_VERBS@) options="@OPTIONS@" ;;
@CASES@
  esac
  case "$verb" in
    tournament) recipes="@STUDIES@" ;;
    show) recipes="@RECIPES@ @STUDIES@" ;;
  esac
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=( $(compgen -W "@VERBS@ --help --version" -- "$word") )
  elif [[ "$before" == "--config" || "$before" == "-c" || "$verb" == "show" ]]; then
    COMPREPLY=( $(compgen -W "$recipes" -- "$word") $(compgen -f -- "$word") )
  elif [[ "$word" == -* ]]; then
    COMPREPLY=( $(compgen -W "$options" -- "$word") )
  elif [[ "$verb" == "completion" ]]; then
    COMPREPLY=( $(compgen -W "@SHELLS@" -- "$word") )
  elif [[ "$verb" == "new" && $COMP_CWORD -eq 2 ]]; then
    COMPREPLY=( regime )
  else
    COMPREPLY=( $(compgen -f -- "$word") )
  fi
}
complete -o filenames -F _lit_reason lit-reason
"""

ZSH_HEAD = """\
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
"""


def verb_options() -> dict[str, list[str]]:
    """Long options of each verb that has a parser of its own; none of them imports anything heavy for it."""
    found = {}
    for verb in OTHER_VERBS.keys() - {"list", "show", *LIKE_FIT}:
        module = importlib.import_module(module_of(verb))
        found[verb] = module.build_parser().options()
    found["inspect"].append("--split")  # with --config alone
    return dict(sorted(found.items()))


def option_names(schema: dict[str, Any]) -> list[str]:
    """Every dotted option that a recipe schema knows, sorted; a class choice stands for all its classes.

    Args:
        schema: from `recipe_schema`.
    """
    found: set[str] = set()

    def collect(node: dict[str, Any], path: str, trail: tuple[str, ...]) -> None:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in trail:
                collect(schema["$defs"][name], path, (*trail, name))
            return
        for key, value in node.get("properties", {}).items():
            if not key.endswith("+"):
                found.add(f"{path}{key}")
                collect(value, f"{path}{key}.", trail)
        if "x-classes" in node:
            if path.count(".") == 1:  # `--model.x` reaches the chosen class; those deeper down stand in lists
                for reference in {ref["$ref"] for ref in node["x-classes"].values()}:
                    collect({"$ref": reference}, path, trail)
            return
        for branch in node.get("anyOf", []):
            collect(branch, path, trail)

    collect(schema, "--", ())
    return sorted(found)


def script(shell: str, options: Sequence[str] = COMMON) -> str:
    """The completion script.

    Args:
        shell: one of `SHELLS`.
        options: options offered for the verbs that run a recipe.
    """
    recipes, studies = ([recipe.name for recipe in find_recipes(studies=which)] for which in (False, True))
    if shell == "fish":
        return _fish(recipes, studies, options)
    cases = [f'    {verb}) options="{" ".join(names)}" ;;' for verb, names in verb_options().items()]
    text = BASH.lstrip("\n").replace("@CASES@", "\n".join(cases)).replace("@TRAINER_VERBS@", "|".join(LIKE_FIT))
    known = {"VERBS": VERBS, "RECIPES": recipes, "STUDIES": studies, "SHELLS": SHELLS, "OPTIONS": options}
    for mark, words in known.items():
        text = text.replace(f"@{mark}@", " ".join(words))
    comment = f'# {shell} completion of lit-reason; to load it: eval "$(lit-reason completion {shell})"\n'
    return comment + (ZSH_HEAD if shell == "zsh" else "") + text


def _fish(recipes: Sequence[str], studies: Sequence[str], options: Sequence[str]) -> str:
    lines = ["# fish completion of lit-reason; to load it: lit-reason completion fish | source"]
    lines.append("complete -c lit-reason -n __fish_use_subcommand -f")
    for verb, purpose in VERBS.items():
        lines.append(f"complete -c lit-reason -n __fish_use_subcommand -f -a {verb} -d '{purpose}'")
    names, runs = " ".join(recipes), " ".join(LIKE_FIT)
    lines.append(f"complete -c lit-reason -n '__fish_seen_subcommand_from show' -a '{names} {' '.join(studies)}'")
    lines.append(f"complete -c lit-reason -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    lines.append("complete -c lit-reason -n '__fish_seen_subcommand_from new' -a regime")
    for verbs, files in ((f"{runs} inspect", names), ("tournament", " ".join(studies))):
        lines.append(f"complete -c lit-reason -n '__fish_seen_subcommand_from {verbs}' -l config -s c -r -a '{files}'")
    for verb, its_options in verb_options().items():
        seen = f"complete -c lit-reason -n '__fish_seen_subcommand_from {verb}'"
        lines += [f"{seen} -l {option[2:]}" for option in its_options if option not in ("--config", "--help")]
    for option in options:
        if option not in ("--config", "--help"):
            lines.append(f"complete -c lit-reason -n '__fish_seen_subcommand_from {runs}' -l {option[2:]}")
    return "\n".join(lines) + "\n"


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("completion", "Print a completion script.")
    parser.add_argument("shell", choices=SHELLS, help="whose script")
    parser.add_argument("--full", action="store_true", help="with every dotted option; takes some seconds to make")
    return parser


def main(argv: Sequence[str]) -> int:
    """`completion SHELL [--full]`.

    Args:
        argv: arguments after the verb.
    """
    given = build_parser().parse_args(argv)
    options: Sequence[str] = COMMON
    if given.full:
        from lit_reason.cli.reason_cli import house_classes, schema_for

        options = [
            *COMMON,
            *(name for name in option_names(schema_for(*house_classes())) if name not in COMMON),
        ]
    sys.stdout.write(script(given.shell, options))
    return 0
