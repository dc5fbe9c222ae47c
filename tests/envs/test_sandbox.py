"""The sandbox: what honest programs may do, and more than sixty ways out that must all be shut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lit_reason.envs.sandbox import jail
from lit_reason.envs.sandbox.allowed import MODULES, NotAllowed, check_source
from lit_reason.envs.sandbox.jail import Sandbox
from lit_reason.errors import UserError

SETTINGS = {"timeout_s": 10.0, "as_root": True}

HONEST = {
    "print(2 + 2)": "4\n",
    "import math\nprint(round(math.pi, 3))": "3.142\n",
    "from collections import Counter\nprint(Counter('aab')['a'])": "2\n",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(15))": "610\n",
    "class A:\n    def __init__(self, x):\n        self.x = x\nprint(A(3).x)": "3\n",
    "print([i for i in range(5) if i % 2])": "[1, 3]\n",
    "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    print(e)": "division by zero\n",
    "from fractions import Fraction\nprint(Fraction(1, 3) + Fraction(1, 6))": "1/2\n",
    "print('{:.2f} {}'.format(1 / 3, f'{7:03d}'))": "0.33 007\n",
    "import random\nrandom.seed(1)\nprint(0 <= random.random() < 1)": "True\n",
    "import re, datetime\nprint(re.sub('a', 'b', 'aa'), datetime.date(2020, 1, 2))": "bb 2020-01-02\n",
}

# Reach for something from the language's surface: refused by the look at the source, with a reason.
SURFACE = [
    "import os",
    "import sys",
    "import subprocess",
    "import socket",
    "import ctypes",
    "import builtins",
    "import importlib",
    "import threading",
    "import pathlib",
    "import shutil",
    "import math, os",
    "import os.path",
    "from os import system",
    "from . import x",
    "from math import *",
    "from json import __builtins__",
    "().__class__",
    "(1).__class__.__base__.__subclasses__()",
    "print.__self__",
    "(lambda: 0).__globals__",
    "(lambda: 0).__code__",
    "''.__class__.__mro__[1]",
    "import random\nrandom._os",
    "import collections\ncollections._sys",
    "import json\njson.codecs._x",
    "__import__('os')",
    "__builtins__",
    "__loader__",
    "(i for i in [1]).gi_frame.f_back",
    "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame",
    "(lambda: 0).func_globals",
    "class A:\n    __slots__ = ()\nA.__dict__",
    "x = [].__reduce__",
    "def f():\n    yield\nf().gi_code",
    "print(" * 300 + ")" * 300,
    "'\x00'",
    "x" * 30_000,
]

# Get past the surface (the look at the source is off): builtins and modules that are not there, or lead nowhere.
BELOW = [
    "open('/etc/passwd')",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'eval')",
    "input()",
    "globals()",
    "getattr((), '__class__')",
    "vars()",
    "breakpoint()",
    "import os",
    "import re\nre.enum.sys",
    "import json\njson.decoder",
    "import random\nrandom._os.system('id')",
    "import statistics\nstatistics.sys",
    "help()",
    "memoryview(b'1')",
]

# In possession of the real interpreter: `os` found by walking the object graph. Only the process holds now.
GET_OS = """
found = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__
sys = found['sys']
os = sys.modules['os']
real = found['__builtins__'] if isinstance(found['__builtins__'], dict) else found['__builtins__'].__dict__
"""
POSSESSED = [
    "real['open']('/etc/passwd').read()",
    "real['open']('/proc/self/environ').read()",
    "real['open']('/proc/1/cmdline').read()",
    "real['open']('mine.txt', 'w')",
    "real['open']('/tmp/mine.txt', 'w')",
    "os.open('.', 0)",
    "os.listdir('/')",
    "os.mkdir('d')",
    "os.unlink(sys.executable)",
    "os.rename('a', 'b')",
    "os.symlink('/etc/passwd', 'l')",
    "os.chmod('.', 0o777)",
    "os.readlink('/proc/self/exe')",
    "os.system('id') and None or 1 / 0",
    "os.fork()",
    "os.execv('/bin/sh', ['sh'])",
    "os.posix_spawn('/bin/sh', ['sh'], {})",
    "os.kill(1, 9)",
    "os.kill(os.getppid(), 9)",
    "os.killpg(os.getpgid(os.getppid()), 9)",
    "os.setuid(0)",
    "os.setgid(0)",
    "os.setsid()",
    "os.memfd_create('m')",
    "os.truncate('/etc/passwd', 0)",
    "os.chroot('/')",
    "real['__import__']('_socket').socket()",
    "os.posix_spawnp('sh', ['sh'], {})",
    "real['__import__']('_thread').start_new_thread(print, ())",
    "sys.modules['ctypes'].CDLL(None, use_errno=True).syscall(41, 2, 1, 0) < 0 and 1 / 0",
    "sys.modules['resource'].setrlimit(sys.modules['resource'].RLIMIT_AS, (-1, -1))",
]

GREEDY = {
    "while True:\n    pass": "Killed",
    "x = [0] * 10**10": "MemoryError",
    "x = []\nwhile True:\n    x.append('a' * 10**6)": "MemoryError",
    "x = 10 ** (10 ** 9)": "",
    "print('a' * 10**7)": "MemoryError",
    "while True:\n    print('a')": "MemoryError",
    "def f():\n    return f()\nf()": "RecursionError",
    "x = 'a' * 10**9": "MemoryError",
    "raise Exception('a' * 10**6)": "Exception",
    "import re\nre.match('(a+)+$', 'a' * 40 + 'b')": "Killed",
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(**SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def bare():
    """The process alone, without the look at the source."""
    with Sandbox(**SETTINGS, check=False) as made:
        yield made


def test_there_are_more_than_sixty_attempts():
    assert len({*SURFACE, *BELOW, *POSSESSED, *GREEDY}) > 60


@pytest.mark.parametrize("source", HONEST)
def test_honest_programs_run(sandbox, source):
    found = sandbox.run(source)
    assert (found.output, found.error) == (HONEST[source], "")


@pytest.mark.parametrize("source", SURFACE)
def test_the_surface_is_refused_with_a_reason(source):
    with pytest.raises(NotAllowed) as refused:
        check_source(source)
    assert "internal" in str(refused.value) or "no module" in str(refused.value) or "program" in str(refused.value)


@pytest.mark.parametrize("source", BELOW)
def test_what_is_not_offered_is_not_there(bare, source):
    found = bare.run(source)
    assert found.error.startswith(("NameError", "ImportError", "AttributeError")), found


@pytest.mark.parametrize("attempt", POSSESSED)
def test_the_process_holds_a_program_that_has_the_interpreter(bare, attempt):
    if not bare.filtered:
        pytest.skip("this kernel or machine does not filter system calls")
    found = bare.run(f"{GET_OS}\nprint('inside')\n{attempt}\nprint('out')")
    assert found.output == "inside\n", found
    assert found.killed or found.error, found


@pytest.mark.parametrize("source", GREEDY)
def test_greedy_programs_are_stopped(source):
    with Sandbox(timeout_s=2.0, memory_mb=256, as_root=True) as sandbox:
        found = sandbox.run(source)
        assert found.error.startswith(GREEDY[source]) and (found.error or found.killed)
        assert sandbox.run("print(1)").output == "1\n"  # and the next program has a process of its own


def test_programs_do_not_see_each_other(sandbox):
    sandbox.run("x = 1\nimport math\nmath.pi = 3")
    assert sandbox.run("print(x)").error.startswith("NameError")
    assert sandbox.run("import math\nprint(math.pi > 3.1)").output == "True\n"


def test_errors_name_the_line_and_no_path(sandbox):
    found = sandbox.run("x = 1\ny = x / 0")
    assert found.error == "ZeroDivisionError: division by zero (line 2)"
    assert sandbox.run("print('so far')\nboom").text() == "so far\nNameError: name 'boom' is not defined (line 2)\n"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Sandbox(**SETTINGS) as sandbox:
        for _ in range(3):
            sandbox.run("print(1)")
        group = sandbox._spare.get()
        sandbox._spare.put(group)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(group._process.pid, 0)


def test_many_threads_share_the_workers():
    with Sandbox(**SETTINGS, workers=2) as sandbox:
        found = [""] * 8
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, sandbox.run(f"print({i})").output))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [f"{i}\n" for i in range(8)]


def test_root_must_say_so(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    with pytest.raises(UserError, match="refuses to run as root"):
        Sandbox()


AS_NOBODY = """
import json
import test_sandbox as t
from lit_reason.envs.sandbox.jail import Sandbox
with Sandbox(timeout_s=10.0, check=False) as bare:
    filtered = bare.filtered
    start = t.GET_OS + "\\nprint('inside')\\n"
    leaks = [a for a in t.POSSESSED if bare.run(start + a + "\\nprint('out')").output != "inside\\n"]
    wrong = [s for s in t.BELOW if not bare.run(s).error]
with Sandbox(timeout_s=10.0) as whole:
    wrong += [s for s in t.SURFACE if not whole.run(s).error]
with Sandbox(timeout_s=2.0, memory_mb=256) as tight:
    wrong += [s for s, why in t.GREEDY.items() if not tight.run(s).error.startswith(why)]
    wrong += [] if tight.run("print(1)").output == "1\\n" else ["a program after greedy ones"]
print(json.dumps([filtered, leaks, wrong]))
"""


def test_it_holds_as_a_user_without_rights_too(tmp_path_factory):
    if os.getuid() != 0:
        pytest.skip("this is such a user already: the tests above were it")
    with tempfile.TemporaryDirectory() as folder:  # readable for that user, as checkouts of root often are not
        package = Path(folder) / "lit_reason"
        shutil.copytree(Path(jail.__file__).parent, package / "envs/sandbox")
        for name in ("__init__.py", "errors.py", "envs/__init__.py"):
            shutil.copy(Path(jail.__file__).parents[2] / name, package / name)
        shutil.copy(__file__, folder)
        (Path(folder) / "pytest.py").write_text("class mark:\n    parametrize = lambda *a: lambda f: f\n"
                                                "fixture = lambda *a, **k: (lambda f: f)\n")  # fmt: skip
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)
        candidates = [sys.executable, *(shutil.which("python3", path=p) or "" for p in ("/usr/local/bin", "/usr/bin"))]
        for python in filter(None, candidates):
            try:
                done = subprocess.run(
                    [python, "-c", AS_NOBODY], user=65534, group=65534, extra_groups=[], text=True,
                    capture_output=True, cwd=folder, timeout=300, env={"PYTHONDONTWRITEBYTECODE": "1"},
                )  # fmt: skip
                break
            except PermissionError:
                continue
        else:
            pytest.skip("no Python that another user may run")
        assert done.returncode == 0, done.stderr
        filtered, leaks, wrong = json.loads(done.stdout)
        assert (leaks if filtered else []) == [] and wrong == []


def test_the_modules_on_offer_are_of_the_standard_library():
    assert set(MODULES) <= sys.stdlib_module_names
