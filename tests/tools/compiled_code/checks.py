"""What must hold of the GPU kernels as they are compiled: copies and products are waited for, no
load that is not coherent reads what the kernel writes, ReLU's sign is computed alike everywhere.

Each check returns what it found wrong, as text; an empty list is a pass.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from report import cuda_resources as cuda

from . import ptx
from .ptx_run import Block

ROUNDS = 3  # tiles that a program makes

# --- Triton's kernels: one block


def numbers(kernel: str, constants: dict[str, object]) -> dict[str, int]:
    """Of a launch that is small, and in which every loop goes around more often than its pipeline
    is deep; what is not named is 16."""
    if "BN" not in constants:
        runs = ROUNDS * constants.get("R", 1)
        return {"runs": runs, "rows": runs, "chunk": runs, "channels": 64, "inner": 64,
                "chunks": 70, "chunks2": 70, "values": 4096, "first_norm": 0}  # fmt: skip
    bk, bn = constants["BK"], constants["BN"]
    deep = 6 * bk if constants.get("R") == 1 else 2 * bk
    if "IMAGES" in constants:
        images, down, across = (constants[name] for name in ("IMAGES", "TH", "TW"))
    else:
        images, down, across = 1, 1, constants["M"]
    wide = ROUNDS * across
    return {
        "N": images, "P": down, "Q": wide, "K": bn, "channels": deep, "channels2": 6 * bk,
        "tiles": ROUNDS, "image": down * wide, "row": bn if "M" in constants else wide,
        "column": 1, "first": 0, "pixels": images * down * wide, "H": down, "W": wide, "C": deep,
        "depth": deep, "H2": down, "W2": wide, "C2": 6 * bk, "groups": 1,
    }  # fmt: skip


class Text(NamedTuple):
    """What Triton made of a kernel."""

    ptx: str
    ttgir: str


def run(text: Text, constants: dict[str, object]) -> Block:
    """Runs a block; ``memory.faults`` says what nothing orders."""
    kernel = ptx.parse_one(text.ptx)
    threads = int(re.search(r"\.reqntid\s+(\d+)", text.ptx)[1])
    arguments = ptx.arguments(text.ttgir)
    return Block(kernel, arguments, numbers(kernel.name, constants), threads).run()


# --- loads that are not coherent


def incoherent(kernel: ptx.Kernel) -> list[str]:
    """Loads through the cache that stores do not reach (``ld.global.nc``), of a tensor that the
    same kernel writes or may write."""
    found = ptx.accesses(kernel)
    written = frozenset().union(*found.stores.values())
    anywhere = any(not of for of in found.stores.values())  # a store that may be to any tensor
    return [
        f"{kernel.name}: line {line} loads {', '.join(sorted(of)) or 'an unknown tensor'}"
        for line, of in found.not_coherent.items()
        if of & written or (found.stores and (anywhere or not of))
    ]


def compile_ptx(source: Path, architecture: str) -> str:
    """The PTX of a source of ``csrc/cuda``."""
    compute = architecture.replace("sm", "compute")
    flags = [*cuda.SETUP["common_flags"](), "-DUSE_CUDA", f"-arch={compute}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        command = [cuda.SETUP["nvcc"](), *flags, "-ptx", str(source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_text()


# --- machine code


class Operation(NamedTuple):
    """An instruction of the machine code, as "FFMA.FTZ" "R1" ("R2", "R3", "R4")."""

    name: str
    operands: tuple[str, ...]


def disassemble(cubin: bytes) -> dict[str, list[Operation]]:
    """By the kernels' mangled names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuda.cuobjdump(), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read_sass(text)


def read_sass(text: str) -> dict[str, list[Operation]]:
    """What ``cuobjdump -sass`` writes."""
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
    return {
        part.split()[0]: [
            Operation(name, tuple(o.strip() for o in operands.split(",")))
            for name, operands in line.findall(part)
        ]
        for part in text.split("Function : ")[1:]
    }


_REGISTER = re.compile(r"\bR(\d+)\b")


def _register(operand: str) -> int:
    """4 of "-R4.reuse" and "|R4|"; -1: none."""
    found = _REGISTER.search(operand)
    return int(found[1]) if found else -1


def _written(operation: Operation) -> range:
    """The registers that it writes."""
    name = operation.name
    if name.startswith(("ST", "RED", "BAR", "BRA")) or not operation.operands:
        return range(0)
    wide = re.search(r"\.(64|128|256)\b", name)
    count = int(wide[1]) // 32 if wide else 2 if re.match(r"F\w+2\b", name) else 1
    first = _register(operation.operands[0])
    return range(first, first + count) if first >= 0 else range(0)


_ZERO = {"RZ", "-RZ", "0"}


def _arithmetic(code: list[Operation], made: list[dict], place: int, operands) -> int:
    """The latest addition, multiplication or fused one that makes one of these; -1: there is none.
    Of a fused one the summand is not looked at."""
    makers = [made[place].get(_register(operand), -1) for operand in operands]
    return max((i for i in makers if i >= 0 and re.match(r"F(ADD|MUL|FMA)2?\b", code[i].name)),
               default=-1)  # fmt: skip


def _compared(operation: Operation) -> list[str]:
    """What is compared with zero, or of which and zero the larger is taken."""
    name, operands = operation
    if name.startswith("F2FP.RELU"):  # two values, as they are rounded
        return [o for o in operands[1:3] if o not in _ZERO]
    between = ()
    if re.match(r"FSETP\.(GTU|LEU|GT|LE)\b", name):
        between = operands[2:4]
    elif name.startswith("FMNMX"):
        between = operands[1:3]
    values = [o for o in between if o not in _ZERO]
    return values if len(values) == 1 else []


def signs(code: list[Operation]) -> Counter[tuple[str, ...]]:
    """How the values are made that are compared with zero: the names of the last additions,
    multiplications and fused ones, last first, as ("FFMA", "FADD")."""
    # In the text before: of each register, where it was written last.
    made, last = [], {}
    for place, operation in enumerate(code):
        made.append(last)
        written = _written(operation)
        if written:
            last = last | dict.fromkeys(written, place)
    found: Counter[tuple[str, ...]] = Counter()
    for place, operation in enumerate(code):
        for compared in _compared(operation):
            chain, at = [], _arithmetic(code, made, place, [compared])
            while at >= 0 and len(chain) < 3:
                chain.append(re.match(r"F[A-Z]+", code[at].name)[0])
                at = _arithmetic(code, made, at, code[at].operands[1:3])
            found[tuple(chain)] += 1
    return found


SIGN = ("FFMA", "FADD")  # (x - centre) * scale + shift, rounded twice


def wrong_signs(code: list[Operation], least: int, also: tuple = ()) -> list[str]:
    """A ReLU that stops by another sum than ``SIGN``, or by one of ``also``; ``least``: how many
    values are compared at least."""
    found = signs(code)
    wrong = [
        f"{count} values are compared that {' of '.join(chain) or 'nothing here'} makes"
        for chain, count in found.items()
        if chain != SIGN and chain not in also
    ]
    if found[SIGN] < least:
        wrong.append(f"{found[SIGN]} values of {least} are made by {' of '.join(SIGN)}")
    return wrong


# --- pipes


class Pipes(NamedTuple):
    """Instructions of a kernel, a loop's counted once: of float64, of the special functions' unit
    (1 / x, square roots); and the bytes of global memory that a thread moves in them."""

    fp64: int
    special: int
    bytes: int

    @property
    def fp64_per_byte(self) -> float:
        return self.fp64 / max(1, self.bytes)

    @property
    def special_per_byte(self) -> float:
        return self.special / max(1, self.bytes)


def pipes(code: list[Operation]) -> Pipes:
    """Of the machine code; what TMA moves is not in ``bytes``."""
    fp64 = sum(bool(re.match(r"D(ADD|MUL|FMA|SETP)\b", o.name)) for o in code)
    special = sum(o.name.startswith("MUFU") for o in code)
    moved = 0
    for o in code:
        if re.match(r"(LDG|STG|LDGSTS|LD|ST)\b", o.name):
            width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", o.name)
            moved += int(next(filter(None, width.groups()))) // 8 if width else 4
    return Pipes(fp64, special, moved)
