"""The program inside the sandbox's process: it locks the door behind itself, then runs one program from standard input.

Run by path as `python -I -S inmate.py`, with nothing but the standard library; the layers are explained in `jail`.
"""

import builtins
import ctypes
import importlib
import io
import json
import os
import platform
import resource
import struct
import sys
import types

# Syscall numbers by machine: what no computing program needs once it runs.
REFUSED = {
    "x86_64": (
        *(2, 257, 437, 85, 304),  # open, openat, openat2, creat, open_by_handle_at
        *(41, 53, 42, 49, 50, 43, 288, 425, 426),  # sockets; io_uring
        *(56, 57, 58, 435, 59, 322),  # clone, fork, vfork, clone3, execve, execveat
        *(62, 200, 234, 101, 310, 311, 297, 129, 424),  # kill and its kin, ptrace, memory of others
        *(
            82,
            87,
            84,
            83,
            90,
            92,
            264,
            316,
            263,
            258,
            88,
            86,
            265,
            266,
            133,
            259,
            76,
            132,
            235,
            280,
            89,
            267,
            319,
        ),  # files by name
        *(
            165,
            166,
            272,
            308,
            161,
            155,
            105,
            106,
            113,
            117,
            112,
            109,
            157,
            321,
            250,
            248,
            139,
            173,
            172,
            246,
            169,
            298,
            323,
            103,
        ),
    ),
    "aarch64": (
        *(56, 437, 265),  # openat, openat2, open_by_handle_at
        *(198, 199, 203, 200, 201, 202, 242, 425, 426),
        *(220, 435, 221, 281),
        *(129, 130, 131, 117, 270, 271, 240, 138, 424),
        *(34, 35, 36, 37, 38, 276, 33, 53, 54, 45, 88, 78, 279),
        *(40, 39, 97, 268, 51, 41, 146, 144, 145, 147, 157, 154, 167, 280, 219, 217, 104, 142, 241, 282, 116),
    ),
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LIMITS: dict = {}  # what the jail allows, from the command line


def lock() -> str:
    """Give up what the process can: memory, time, files, rights, and the system calls above. Say how far it came."""
    for name, value in (("AS", LIMITS["memory"]), ("CPU", LIMITS["cpu"]), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody attaches
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    libc.unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET, where the kernel lets users do that
    machine = platform.machine()
    return "seccomp" if machine in REFUSED and filter_calls(libc, machine) else "limits"


def filter_calls(libc: ctypes.CDLL, machine: str) -> bool:
    """A seccomp filter that answers the refused calls with EPERM, and kills on calls of another architecture."""

    def statement(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, ret = 0x20, 0x15, 0x06
    numbers = REFUSED[machine]
    program = [
        statement(load, 4),
        statement(equal, AUDIT_ARCH[machine], 1, 0),
        statement(ret, 0x80000000),  # SECCOMP_RET_KILL_PROCESS
        statement(load, 0),
        statement(0x35, 0x40000000, len(numbers) + 1, 0),  # x32 calls count as refused
        *(statement(equal, number, len(numbers) - i, 0) for i, number in enumerate(numbers)),
        statement(ret, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        statement(ret, 0x00050001),  # SECCOMP_RET_ERRNO | EPERM
    ]
    code = b"".join(program)
    held = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("HP", len(program), ctypes.addressof(held))
    return libc.prctl(22, 2, fprog, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def public(module: types.ModuleType) -> types.SimpleNamespace:
    """What a program sees of a module: its public names, but for the modules it happens to have imported."""
    names = [n for n in dir(module) if not n.startswith("_") and not isinstance(getattr(module, n), types.ModuleType)]
    return types.SimpleNamespace(**{n: getattr(module, n) for n in names})


def main() -> None:
    """Prepare, report for duty, run, answer."""
    LIMITS.update(json.loads(sys.argv[1]))
    modules = {name: public(importlib.import_module(name)) for name in LIMITS["modules"]}
    # Imported now, while files can still be read: a traceback wants them.
    import linecache  # noqa: F401
    import traceback

    def import_module(
        name: str, given: object = None, scope: object = None, names: tuple = (), level: int = 0
    ) -> object:
        if name not in modules or level:
            raise ImportError(f"there is no module '{name}' here")
        return modules[name]

    offered = {name: getattr(builtins, name) for name in LIMITS["builtins"]}
    scope = {
        "__builtins__": {**offered, "__import__": import_module, "__build_class__": __build_class__},
        "__name__": "program",
    }
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    print(json.dumps({"ready": lock()}), file=out, flush=True)
    source = json.loads(sys.stdin.readline())
    printed = io.StringIO()
    write = printed.write

    def capped(text: str) -> int:
        if printed.tell() + len(text) > LIMITS["output"]:
            raise MemoryError(f"more than {LIMITS['output']} characters of output")
        return write(text)

    printed.write = capped  # type: ignore[method-assign]
    sys.stdout = sys.stderr = printed
    error = ""
    try:
        exec(compile(source, "program", "exec"), scope)
    except BaseException as raised:  # whatever the program raises, SystemExit included, is its answer
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(raised.__traceback__)) if f.filename == "program"), 0
        )
        error = f"{type(raised).__name__}: {raised}"[:500] + (f" (line {line})" if line else "")
    print(json.dumps({"output": printed.getvalue(), "error": error}), file=out, flush=True)


if __name__ == "__main__":
    main()
