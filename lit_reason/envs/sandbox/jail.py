"""The sandbox: a pool of warm processes, each of which runs one program and is thrown away.

Layers, from the outside in. A wall clock, after which the whole process group is killed. A process with an empty
environment, no inherited files, an empty private folder, no rights (`nobody` where it began as root, no new
privileges) and limits of memory, processor time and file size. A user and a network namespace of its own where the
kernel allows it. A filter of system calls, installed once the interpreter is up: no files are opened any more, no
sockets, no processes. Inside, a table of builtins and public names of some modules, and before all that a look at the
source (`allowed`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_reason.envs.sandbox.allowed import BUILTINS, MODULES, NotAllowed, check_source
from lit_reason.errors import UserError

_INMATE = Path(__file__).with_name("inmate.py")
_START_S = 20.0  # a process that is not ready by then never will be


@dataclass(frozen=True)
class Outcome:
    """What a program came to.

    Attributes:
        output: what it printed.
        error: why it did not finish, empty when it did; never a traceback with paths.
        killed: it was stopped from outside: time, or a limit.
    """

    output: str
    error: str
    killed: bool = False

    def text(self) -> str:
        """Output and error as a model reads them."""
        return self.output + (f"{self.error}\n" if self.error else "")


class Sandbox:
    """Runs programs that nobody has read.

    Args:
        timeout_s: wall clock of a program.
        memory_mb: address space of its process.
        output_chars: most characters it may print.
        workers: warm processes kept ready.
        as_root: run although this process is root. The program runs as `nobody` then; still, a user without rights is
            safer.
        check: look at the source first; without it the process alone holds (for tests of the process).

    Raises:
        UserError: this process is root, and nobody said that this is meant.
    """

    def __init__(
        self,
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        output_chars: int = 10_000,
        workers: int = 1,
        as_root: bool = False,
        check: bool = True,
    ) -> None:
        if os.getuid() == 0 and not as_root:
            raise UserError(
                "the sandbox refuses to run as root: run as a user without rights, or set sandbox.as_root to true if "
                "this machine is one to lose"
            )
        self.timeout_s, self.output_chars, self.check = timeout_s, output_chars, check
        self._limits = json.dumps(
            {
                "memory": memory_mb * 2**20,
                "cpu": int(timeout_s) + 1,
                "output": output_chars,
                "modules": MODULES,
                "builtins": BUILTINS,
            }
        )
        self._spare: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        for _ in range(workers):
            self._spare.put(_Worker(self._limits))

    def run(self, source: str) -> Outcome:
        """Run a program.

        Args:
            source: Python.

        Returns:
            Output and error. Whatever the program does, this returns within the time limit and some.
        """
        if self.check:
            try:
                check_source(source)
            except NotAllowed as refused:
                return Outcome("", f"NotAllowed: {refused}")
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
        worker = self._spare.get()
        try:
            return worker.run(source, self.timeout_s, 6 * self.output_chars + 4096)
        finally:
            worker.kill()
            self._spare.put(_Worker(self._limits))

    @property
    def filtered(self) -> bool:
        """Whether system calls are filtered here; where they are not, limits and namespaces alone hold."""
        worker = self._spare.get()
        self._spare.put(worker)
        return worker.ready() == "seccomp"

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._spare.get_nowait().kill()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Worker:
    """A process that waits for one program."""

    def __init__(self, limits: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lit-reason-sandbox-")
        os.chmod(self._folder.name, 0o711)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_INMATE), limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={},
            close_fds=True,
            start_new_session=True,
        )
        self._ready: str | None = None

    def ready(self) -> str:
        """Wait until the process has locked itself in; how far that went."""
        if self._ready is None:
            line, _ = self._line(_START_S, 4096)
            try:
                self._ready = str(json.loads(line)["ready"])
            except (ValueError, KeyError, TypeError) as error:
                raise RuntimeError(f"the sandbox process did not start: {line[:200]!r}") from error
        return self._ready

    def run(self, source: str, timeout_s: float, most: int) -> Outcome:
        self.ready()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(source).encode() + b"\n")
            self._process.stdin.flush()
        line, late = self._line(timeout_s, most)
        try:
            answer = json.loads(line)
            return Outcome(str(answer["output"]), str(answer["error"]))
        except (ValueError, KeyError, TypeError):
            why = f"no result within {timeout_s:g} s" if late else "stopped by a limit of the sandbox"
            return Outcome("", f"Killed: {why}", killed=True)

    def _line(self, timeout_s: float, most: int) -> tuple[bytes, bool]:
        """One line of at most `most` bytes from the process, and whether time ran out."""
        assert self._process.stdout is not None
        stream, got, deadline = self._process.stdout, b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not got.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return b"", True
                piece = os.read(stream.fileno(), 65536)
                got += piece
                if not piece or len(got) > most:
                    return b"", False
        return got, False

    def kill(self) -> None:
        """End the process and all it may have started, and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()
