"""`lit-reason doctor`: what this machine has, what is missing, how to get it. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lit_reason import __version__
from lit_reason.cli.command_parser import CommandParser

REQUIRED = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "torchmetrics",
    "jsonargparse",
    "omegaconf",
    "numpy",
    "pyyaml",
    "jinja2",
    "matplotlib",
    "filelock",
    "tqdm",
)
OPTIONAL = (
    ("triton", "gpu", "fused kernels on a GPU"),
    ("bitsandbytes", "quant", "QLoRA: a base model in 4 or 8 bits"),
    ("datasets", "hub", "Hugging Face data sets and parquet files"),
    ("gguf", "gguf", "models from .gguf files"),
    ("math-verify", "eval", "checking boxed mathematical answers"),
    ("botorch", "shaping", "searching the weights of shaped rewards"),
    ("bm25s", "search", "environments that search a corpus"),
    ("reasoning-gym", "reasoning-gym", "its tasks as environments"),
    ("rouge-score", "unlearn", "ROUGE-L recall of the unlearning scores"),
    ("lm-eval", "mmlu", "utility by MMLU"),
    ("tensorboard", "track", "TensorBoard logger"),
    ("wandb", "track", "Weights & Biases logger"),
    ("shtab", "completion", "the parser's own shell completion"),
)


def version_of(package: str) -> str | None:
    """Installed version of a distribution, read from its metadata; None when it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_count() -> int:
    """CPUs that this process may use: affinity and a control group's quota are respected."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def _first_words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def memory_gb() -> tuple[float, float] | None:
    """(available, total) memory in gigabytes of 1e9 bytes, or None where the system does not tell."""
    if not Path("/proc/meminfo").is_file():
        return None
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    kibi = {key: int(value.split()[0]) for key, value in rows.items() if value.split()}
    total, available = kibi["MemTotal"] * 1024, kibi["MemAvailable"] * 1024
    limit = _first_words(Path("/sys/fs/cgroup/memory.max"))
    if limit and limit[0].isdigit():
        total, available = min(total, int(limit[0])), min(available, int(limit[0]))
    return available / 1e9, total / 1e9


def nvidia_devices() -> list[str] | None:
    """One line a GPU from `nvidia-smi`; empty when it reports none, None where the program is missing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [
        program,
        "--query-gpu=name,memory.total,memory.used,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, total, used, driver = fields
            lines.append(f"{name}, {total} MiB ({used} in use), driver {driver}")
    return lines


def torch_report() -> list[str]:
    """What torch itself sees. Imports torch, which takes seconds."""
    import torch

    lines = [
        f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'no'}",
        f"{torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        lines.append(
            f"cuda:{index} {device.name}, {device.total_memory / 1e9:.1f} GB, "
            f"compute capability {device.major}.{device.minor}, bfloat16 {bf16}"
        )
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    if len(lines) == 2:
        lines.append("no accelerator: training runs on the CPU")
    return lines


def report(full: bool = False) -> tuple[str, bool]:
    """The whole report.

    Args:
        full: import torch and ask it for the devices.

    Returns:
        The text, and whether everything required is installed.
    """
    lines = [
        f"lit-reason {__version__}, Python {platform.python_version()} at {sys.executable}",
        platform.platform(),
    ]
    lines += ["", "Machine", f"  CPUs     {cpu_count()}"]
    memory = memory_gb()
    if memory:
        lines.append(f"  memory   {memory[0]:.1f} GB free of {memory[1]:.1f} GB")
    disk = shutil.disk_usage(Path.cwd())
    lines.append(f"  disk     {disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB here")
    devices = nvidia_devices()
    found = devices if devices else ["no NVIDIA GPU" + (" (nvidia-smi is not installed)" if devices is None else "")]
    lines += [f"  GPU      {text}" for text in found]
    if full:
        lines += [f"  torch    {text}" for text in torch_report()]
    required = {package: version_of(package) for package in REQUIRED}
    lines += ["", "Packages"]
    lines += [f"  {name:<14}{version or 'MISSING: pip install lit-reason'}" for name, version in required.items()]
    lines += ["", "Optional parts"]
    for name, extra, use in OPTIONAL:
        version = version_of(name)
        state = version if version else f"not installed: pip install 'lit-reason[{extra}]'"
        lines.append(f"  {name:<14}{state}  ({use})" if not version else f"  {name:<14}{state}")
    if not full:
        lines += ["", "`lit-reason doctor --full` also asks torch for its devices (takes some seconds)."]
    return "\n".join(lines), None not in required.values()


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("doctor", "Versions, devices, and what is missing.")
    parser.add_argument("--full", action="store_true", help="import torch and list the devices it sees")
    return parser


def main(argv: Sequence[str]) -> int:
    """`doctor [--full]`.

    Args:
        argv: arguments after the verb.

    Returns:
        0, or 1 when a required package is missing.
    """
    text, complete = report(build_parser().parse_args(argv).full)
    print(text)
    return 0 if complete else 1
