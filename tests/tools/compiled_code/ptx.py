"""Reads the text that a compiler made of a kernel: its PTX as a list of instructions, the order of
its parameters, and the boxes of its tensor descriptors.

``ptx_run.py`` runs such a kernel for one block, ``checks.py`` says what must hold.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of PTX.

    name: with all its dots, as ``ld.global.v4.b32``; guard: ``%p1``, ``!%p1`` or "";
    operands: as written, a list in braces or an address in brackets is one of them.
    """

    line: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def registers(self) -> tuple[list[str], list[str]]:
        """Those that it writes, and those that it reads."""
        stores = re.match(r"st\.|red\.|stmatrix|mbarrier\.(init|inval|arrive)|cp\.async|bra|ret|"
                          r"bar\.|fence|membar|prefetch", self.name)  # fmt: skip
        names = [re.findall(r"%\w+", operand) for operand in self.operands]
        written = [] if stores or not names else names[0]
        read = [name for operand in names[0 if stores else 1 :] for name in operand]
        if self.name.startswith("wgmma.mma_async"):  # the sums are read too
            read += written
        return written, read + ([self.guard.lstrip("!")] if self.guard else [])


class Kernel(NamedTuple):
    """A kernel's name, parameters in order, instructions, and where its labels are: the place in
    ``code`` of the instruction that comes next."""

    name: str
    parameters: list[str]
    code: list[Instruction]
    labels: dict[str, int]


def split_operands(text: str) -> tuple[str, ...]:
    """ "{%r1, %r2}, [%rd1+16], 4" as three."""
    found, depth, word = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(word.strip())
            word = ""
        else:
            word += character
    return tuple(w for w in [*found, word.strip()] if w)


_STATEMENT = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


def _statements(text: str):
    """(line, statement or label) of a function's body, several of a line too."""
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"//.*", "", line).strip()
        if line.startswith(".loc"):  # no semicolon
            continue
        while line:
            label = None if pending else re.match(r"(\$?\w+):\s*", line)
            if label:
                yield number, f"{label[1]}:"
                line = line[label.end() :]
                continue
            if not pending and line[0] in "{}":  # a scope of registers
                line = line[1:].strip()
                continue
            before, semicolon, line = line.partition(";")
            first = first if pending else number
            pending += f" {before}"
            line = line.strip()
            if semicolon:
                yield first, pending.strip()
                pending = ""


def parse(text: str) -> list[Kernel]:
    """Every kernel (``.entry``) of a module's PTX."""
    kernels = []
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.S):
        depth, stop = 1, match.end()
        while depth:
            stop = min(i for i in (text.find("{", stop), text.find("}", stop)) if i >= 0) + 1
            depth += 1 if text[stop - 1] == "{" else -1
        before = text.count("\n", 0, match.end())
        code, labels = [], {}
        for number, statement in _statements(text[match.end() : stop - 1]):
            if statement.endswith(":"):
                labels[statement[:-1]] = len(code)
                continue
            found = _STATEMENT.match(statement)
            if found:  # else a directive
                guard, name, operands = found.groups()
                operands = split_operands(operands)
                code.append(Instruction(number + before, guard or "", name, operands))
        parameters = re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", match[2].strip())
        kernels.append(Kernel(match[1], parameters, code, labels))
    return kernels


def parse_one(text: str) -> Kernel:
    """The only kernel of a module.

    Raises:
        ValueError: there are none or several.
    """
    (kernel,) = parse(text)
    return kernel


# --- Triton's own language: what the PTX does not say

_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1, "f64": 8, "i32": 4}


class Box(NamedTuple):
    """The block of a tensor descriptor. swizzle: bytes of a row after which the pattern repeats; a
    longer row is copied in several messages."""

    shape: tuple[int, ...]
    element: int  # bytes
    swizzle: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.element

    @property
    def message(self) -> tuple[int, ...]:
        """The box of one copy."""
        most = self.swizzle // self.element if self.swizzle else 256
        return (*(min(n, 256) for n in self.shape[:-1]), min(self.shape[-1], most))

    @property
    def message_bytes(self) -> int:
        return math.prod(self.message) * self.element


def arguments(ttgir: str) -> dict[str, Box | str]:
    """Arguments of the kernel in the order of its parameters: a descriptor's box, or the type."""
    layouts = {}
    for name, width in re.findall(
        r"^(#\w+) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+)", ttgir, re.M
    ):
        layouts[name] = int(width)
    head = re.search(r"tt\.func public @\w+\((.*?)\)\s*(?:attributes[^\n]*)?\{\n", ttgir, re.S)[1]
    found: dict[str, Box | str] = {}
    for name, rest in re.findall(r"%([\w.]+): (!tt\.tensordesc<[^>]*>+|!?[\w.]+(?:<\w+>)?)", head):
        box = re.match(r"!tt\.tensordesc<(?:tensor<)?([\dx]+)x(\w+), (#\w+)>", rest)
        if box:
            shape = tuple(map(int, box[1].split("x")))
            found[name] = Box(shape, _BYTES[box[2]], layouts.get(box[3], 0))
        else:
            found[name] = rest
    return found


# --- where a value comes from


def definitions(kernel: Kernel) -> dict[str, list[Instruction]]:
    """The instructions that write each register."""
    found = defaultdict(list)
    for instruction in kernel.code:
        for name in instruction.registers[0]:
            found[name].append(instruction)
    return found


def bases(register: str, defined: dict[str, list[Instruction]], memo: dict) -> frozenset[str]:
    """The pointer parameters that an address may be computed from, each as the ``[parameter]`` or
    ``[parameter+16]`` that it is loaded from.

    Where a compiler says which values are pointers (``cvta``), other numbers are none.
    """
    if register in memo:
        return memo[register]
    memo[register] = frozenset()  # of a loop
    found: frozenset[str] = frozenset()
    for instruction in defined.get(register, ()):
        name, (_, *sources) = instruction.name, instruction.operands or ("",)
        if re.match(r"ld\.param\.(b64|u64|s64)", name):
            found |= {re.sub(r"\s", "", sources[0])}
        elif re.match(r"(add|sub|mad|mov|selp|cvta|or|and|mul|shl|cvt|min|max|fma)\b", name):
            if name.startswith(("mad", "mul", "shl", "cvt.")) and "wide" in name:
                sources = sources[-1:] if name.startswith("mad") else []
            elif name.startswith(("mul", "shl", "cvt.")):
                sources = []
            elif name.startswith("mad"):
                sources = sources[-1:]
            for source in sources:
                for word in re.findall(r"%\w+", source):
                    found |= bases(word, defined, memo)
    memo[register] = found
    return found


class Accesses(NamedTuple):
    """Of global memory: the bases of every load that is not coherent, of every other load and of
    every store; ``unknown``: lines whose address comes from no parameter."""

    not_coherent: dict[int, frozenset[str]]
    loads: dict[int, frozenset[str]]
    stores: dict[int, frozenset[str]]
    unknown: list[int]


def accesses(kernel: Kernel) -> Accesses:
    """Where a kernel loads and stores."""
    defined, memo = definitions(kernel), {}
    pointers = {
        found
        for instruction in kernel.code
        if instruction.name.startswith("cvta.to.global")
        for word in re.findall(r"%\w+", instruction.operands[1])
        for found in bases(word, defined, memo)
    }
    found = Accesses({}, {}, {}, [])
    for instruction in kernel.code:
        kind = re.match(r"(ld|st|red|atom)(?:\.\w+)*?\.global(.*)", instruction.name)
        if not kind:
            continue
        address = next(o for o in instruction.operands if o.startswith("["))
        of: frozenset[str] = frozenset()
        for word in re.findall(r"%\w+", address):
            of |= bases(word, defined, memo)
        of = of & pointers if of & pointers else of
        if not of:
            found.unknown.append(instruction.line)
        if kind[1] == "ld":
            where = found.not_coherent if re.search(r"\.nc\b", kind[2]) else found.loads
            where[instruction.line] = of
        else:
            found.stores[instruction.line] = of
            if kind[1] == "atom":
                found.loads[instruction.line] = of
    return found
