"""A census of the compiled Triton kernels, for GPUs that need not be here: registers, memory, kinds of instruction.

    python tests/aot/census.py           # the census as JSON
    python tests/aot/census.py --write   # and into golden.json, for the installed release of Triton

Triton's package holds the assembler and disassembler of CUDA, so this runs on any Linux machine, but not in a process
where Triton interprets kernels (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).parent / "golden.json"
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
ALL = (80, 90, 100)


class Variant(NamedTuple):
    """One specialisation of a kernel.

    Args:
        kernel: its name in `triton_kernels`.
        dtype: of the logits.
        full: with a bias, a cap and, where there is one, a gradient of the entropy; else without any.
        kind: of the divergence, for the kernels that have one.
        aligned: whether the vocabulary is a multiple of 16; row strides always are.
        archs: compute capabilities it is compiled for.
    """

    kernel: str
    dtype: str = "bf16"
    full: bool = False
    kind: str | None = None
    aligned: bool = True
    archs: tuple[int, ...] = (90,)

    def name(self, arch: int) -> str:
        parts = [
            self.kernel,
            self.kind,
            self.dtype,
            "full" if self.full else "plain",
            None if self.aligned else "ragged",
        ]
        return " ".join([*(part for part in parts if part), f"sm_{arch}"])


VARIANTS = [
    Variant("stats_kernel", archs=ALL),
    Variant("stats_kernel", full=True, archs=ALL),
    Variant("stats_kernel", aligned=False),
    Variant("stats_kernel", "fp16"),
    Variant("stats_kernel", "fp32", full=True),
    Variant("grad_kernel", archs=ALL),
    Variant("grad_kernel", full=True, archs=ALL),
    Variant("grad_kernel", aligned=False),
    Variant("grad_kernel", "fp16"),
    Variant("grad_kernel", "fp32", full=True),
    Variant("divergence_kernel", kind="fkl"),
    Variant("divergence_kernel", kind="rkl"),
    Variant("divergence_kernel", kind="jsd", archs=ALL),
    Variant("divergence_kernel", kind="jsd", full=True),
    Variant("divergence_kernel", "fp32", kind="jsd", full=True),
    Variant("divergence_grad_kernel", kind="fkl"),
    Variant("divergence_grad_kernel", kind="rkl"),
    Variant("divergence_grad_kernel", kind="jsd", archs=ALL),
    Variant("divergence_grad_kernel", kind="jsd", full=True),
    Variant("divergence_grad_kernel", "fp32", kind="jsd", full=True),
]


def compiled(variant: Variant, arch: int):
    """The kernel as a launch on such a GPU would compile it: 16-byte pointers, strides that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_reason.kernels import triton_kernels, triton_rows

    kernel = getattr(triton_kernels, variant.kernel)
    lanes = triton_rows.LANES_OF_A_PAIR if variant.kind else triton_rows.LANES
    constants = {"LANES": lanes, "PER": 8 * triton_rows.LANE_BYTES // BITS[variant.dtype], "KIND": variant.kind}
    types = {}
    for name in kernel.arg_names:
        if not variant.full and name.startswith(("bias", "softcap", "g_entropies")):
            constants[name] = None
        types[name] = "constexpr" if name in constants else _type(name, variant.dtype)
    divisible = [
        position
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name.startswith("row_stride") or (name == "V" and variant.aligned)
    ]
    source = ASTSource(
        kernel,
        types,
        constexprs={(kernel.arg_names.index(name),): v for name, v in constants.items() if name in kernel.arg_names},
        attrs={(position,): [["tt.divisibility", 16]] for position in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=triton_rows.OPTIONS)


def _type(name: str, dtype: str) -> str:
    """How the launcher would describe an argument."""
    if name.startswith("logits"):
        return f"*{dtype}"
    if name.startswith(("scale", "softcap", "beta", "log_beta", "log_rest")):
        return "fp32"
    if name == "V" or name.startswith("row_stride"):
        return "i32"
    return {"targets": "*i64", "hit_out": "*i1"}.get(name, "*fp32")


def count(cubin: bytes, shared: int, tools: Path) -> dict[str, int | list[int]]:
    """What a compiled kernel uses and which instructions it is made of.

    Args:
        cubin: the compiled kernel.
        shared: bytes of dynamic shared memory.
        tools: folder of `cuobjdump`.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", option, file.name] for option in ("-res-usage", "-sass"))
        usage, listing = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    used = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(?:@!?U?P\d+ +)?([A-Z][A-Z0-9_.]+)([^;]*);", listing)
    kinds = collections.Counter(kind for _, kind, _ in lines)
    loops = []
    for address, kind, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands) if kind.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            loops.append([k for a, k, _ in lines if int(target[1], 16) <= int(a, 16) <= int(address, 16)])

    def starting(*names: str, wide: bool = False) -> int:
        return sum(n for kind, n in kinds.items() if kind.split(".")[0] in names and (not wide or ".128" in kind))

    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "spills": starting("LDL", "STL"),
        "shared": shared,
        "loads_128": starting("LDG", wide=True),
        "stores_128": starting("STG", wide=True),
        "tensor_core": starting("HMMA", "HGMMA", "QGMMA", "UTCHMMA"),
        "instructions": sum(kinds.values()),
        "loops": [len(loop) for loop in loops],
        "barriers_in_loops": sum(kind.startswith("BAR") for loop in loops for kind in loop),
    }


def census() -> dict[str, dict]:
    """All variants on all their architectures."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = {}
    for variant in VARIANTS:
        for arch in variant.archs:
            out = compiled(variant, arch)
            found[variant.name(arch)] = count(out.asm["cubin"], out.metadata.shared, tools)
    return found


def main() -> None:
    """Print the census; with --write, keep it."""
    import triton

    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    found = census()
    if parser.parse_args().write:
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        golden[triton.__version__] = found
        rows = {
            version: ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
            for version, table in sorted(golden.items())
        }
        GOLDEN.write_text("{\n" + ",\n".join(f'  "{v}": {{\n{text}\n  }}' for v, text in rows.items()) + "\n}\n")
    json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)


if __name__ == "__main__":
    main()
