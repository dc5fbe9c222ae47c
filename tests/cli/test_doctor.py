"""The doctor's report."""

from __future__ import annotations

import platform
import subprocess

import torch

from lit_reason.cli import doctor


def test_report_has_the_real_versions(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert platform.python_version() in text
    assert f"torch         {torch.__version__}" in text
    assert f"CPUs     {doctor.cpu_count()}" in text
    available, total = doctor.memory_gb()
    assert 0 < available <= total


def test_missing_packages_come_with_the_way_to_get_them(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("peft", "gguf") else "1.0")
    assert doctor.main([]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "MISSING" in lines["peft"] and "1.0" in lines["torch"]
    assert "pip install 'lit-reason[gguf]'" in lines["gguf"] and lines["datasets"].split() == [
        "datasets",
        "1.0",
    ]


def test_every_extra_named_exists():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(doctor.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, extra, _ in doctor.OPTIONAL:
        wanted = "jsonargparse[shtab]" if name == "shtab" else name
        assert any(entry.startswith(wanted) for entry in project["optional-dependencies"][extra]), name
    needed = {entry.partition(">")[0].partition("[")[0].lower() for entry in project["dependencies"]}
    assert needed == set(doctor.REQUIRED)


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(
            command, 0, stdout="NVIDIA X1, 81559, 12, 570.1\nNVIDIA X1, 81559, 0, 570.1\n"
        )

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.nvidia_devices()[0] == "NVIDIA X1, 81559 MiB (12 in use), driver 570.1"
    assert len(doctor.nvidia_devices()) == 2
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 9, stdout="failed, a, b, c"),
    )
    assert doctor.nvidia_devices() == []


def test_without_nvidia_smi(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.nvidia_devices() is None
    assert "no NVIDIA GPU (nvidia-smi is not installed)" in doctor.report()[0]


def test_full_asks_torch():
    text, complete = doctor.report(full=True)
    assert complete and f"torch {torch.__version__}" in text
    assert ("no accelerator" in text) == (not torch.cuda.is_available() and not torch.backends.mps.is_available())
