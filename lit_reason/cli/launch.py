"""`lit-reason launch RECIPE`: write the script that starts a run on several machines. Runs nothing itself."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.recipes import locate
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError

EPILOG = """\
Options that are not listed here go to `lit-reason fit` as they are. The script resumes by itself (`--resume auto`):
start it again after a failure. All machines need the same program, recipe, data, model, and run folder: a shared disk.

Examples
  lit-reason launch sft/smollm2-epic --nodes 4 --scheduler slurm --out run.sbatch --data.train_file my_traces.jsonl
  lit-reason launch mine.yaml --nodes 2 --gpus 4 --scheduler torchrun --strategy ddp"""

TORCHRUN = """\
#!/usr/bin/env bash
# {nodes} machines with {gpus} processes each. On every machine, with its own number from 0 to {last}:
#   MASTER=address-of-machine-0 NODE=number bash {script}
# ADDRESS says under which address the others reach this machine, where its host name does not.
# When a process dies, all of them start again and go on from the newest checkpoint, up to three times.
set -euo pipefail
: "${{MASTER:?set it to the address of machine 0}}" "${{NODE:?set it to the number of this machine, 0 to {last}}}"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
# A store of its own for each start. Shared, it keeps the addresses of processes that are dead, and the next hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
host=0
if [ "$NODE" = 0 ]; then host=1; fi
exec torchrun --nnodes {nodes} --nproc-per-node {gpus} --max-restarts 3 \\
  --rdzv-backend c10d --rdzv-endpoint "$MASTER:${{PORT:-29500}}" --rdzv-id {name} --rdzv-conf "is_host=$host" \\
  ${{ADDRESS:+--local-addr "$ADDRESS"}} -m lit_reason {command}
"""

SLURM = """\
#!/usr/bin/env bash
# {nodes} machines with {gpus} processes each: sbatch {script}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
# Two minutes before its time is over the run saves a checkpoint and exits with 143: then it queues again.
srun --kill-on-bad-exit=1 python -m lit_reason {command}
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
TEMPLATES = {"slurm": SLURM, "torchrun": TORCHRUN}


def script(
    scheduler: str,
    recipe: str,
    *,
    nodes: int,
    gpus: int,
    strategy: str,
    time: str = "24:00:00",
    name: str = "run",
    more: Sequence[str] = (),
) -> str:
    """The text of a script.

    Args:
        scheduler: a key of `TEMPLATES`.
        recipe: file or packaged name, as after `--config`.
        nodes: machines.
        gpus: processes a machine.
        strategy: `trainer.strategy`.
        time: time limit of a SLURM job.
        name: file name of the script.
        more: further arguments of `fit`.
    """
    words = ["fit", "--config", recipe, "--trainer.num_nodes", str(nodes), "--trainer.devices", str(gpus)]
    words += ["--trainer.strategy", strategy]
    if not any(word.partition("=")[0] in ("--resume", "--ckpt_path") for word in more):
        words += ["--resume", "auto"]
    return TEMPLATES[scheduler].format(
        nodes=nodes,
        gpus=gpus,
        last=nodes - 1,
        script=shlex.quote(name),
        name=shlex.quote(Path(name).stem),
        time=time,
        command=shlex.join([*words, *more]),
    )


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("launch", "Write the script that starts a run on several machines.", EPILOG)
    parser.add_argument("recipe", metavar="RECIPE", help="file, or name from `lit-reason list`")
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each machine (default: 8)")
    parser.add_argument("--scheduler", choices=sorted(TEMPLATES), required=True, help="what starts the processes")
    parser.add_argument("--strategy", default="fsdp2", help="trainer.strategy (default: fsdp2)")
    parser.add_argument("--time", default="24:00:00", help="time limit of a SLURM job (default: 24:00:00)")
    parser.add_argument("--out", type=Path, help="write here instead of printing; must not exist")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: arguments after `launch`.

    Returns:
        0; what the user gave wrong is raised as UserError.

    Raises:
        UserError: no such recipe, a number below 1, or the file to write exists.
    """
    given, more = build_parser().parse_known_args(list(argv))
    if given.nodes < 1 or given.gpus < 1:
        raise UserError(f"--nodes {given.nodes} --gpus {given.gpus}: both must be at least 1")
    stray = [word for word in more[:1] if not word.startswith("--")]
    if stray:
        raise UserError(f"launch: one recipe, then options; {stray[0]!r} is neither")
    locate(given.recipe)
    name = given.out.name if given.out else {"slurm": "run.sbatch", "torchrun": "run.sh"}[given.scheduler]
    text = script(
        given.scheduler,
        given.recipe,
        nodes=given.nodes,
        gpus=given.gpus,
        strategy=given.strategy,
        time=given.time,
        name=name,
        more=more,
    )
    if given.out is None:
        print(text, end="")
    elif given.out.exists():
        raise UserError(f"{given.out} exists already: give another name, or remove it")
    else:
        with complete_or_absent(given.out) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        print(f"wrote {given.out}")
    return 0
