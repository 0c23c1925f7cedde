"""Runs one block of a kernel from its PTX, all threads in step, and says which accesses to shared
memory nothing orders: no GPU is needed.

Integers and predicates are computed; a value that was loaded is unknown, and so is all that follows
from it. A branch must be known and the same for every thread. TMA copies, ``cp.async`` and
``wgmma`` finish as late as their waits allow, so that what is read without a wait is seen every
time.
"""

from __future__ import annotations

import operator
import re
from collections import Counter

import numpy as np

from .ptx import Box, Instruction, Kernel
from .shared_memory import SharedMemory

WARP = 32
REGION = 40  # bits of an address inside of a pointer parameter's tensor
MOST = 300_000  # instructions of a run


class Unreadable(Exception):
    """A kernel does what this reader does not know."""


def _width(name: str) -> int:
    found = re.findall(r"(?:\.|^)[busf](\d+)", name)
    return int(found[-1]) if found else 32


def _wrap(value, bits: int):
    """As the register has it: 64 bits signed, fewer unsigned."""
    return value if bits >= 64 else value & ((1 << bits) - 1)


def _signed(value, bits: int):
    if bits >= 64:
        return value
    value = value & ((1 << bits) - 1)
    return np.where(value >= 1 << (bits - 1), value - (1 << bits), value)


def _permuted(a, b, selector):
    """prmt: four bytes of eight; a selector's highest bit asks for the byte's sign eight times."""
    both, result = (b << 32) | a, np.zeros_like(a)
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = both >> 8 * (nibble & 7) & 255
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte << 8 * place
    return result


def _quotient(a, b):
    """Rounded to zero."""
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
            "gt": operator.gt, "ge": operator.ge, "ltu": operator.lt, "gtu": operator.gt,
            "leu": operator.le, "geu": operator.ge, "lo": operator.lt, "hi": operator.gt,
            "ls": operator.le, "hs": operator.ge, "equ": operator.eq,
            "neu": operator.ne}  # fmt: skip
_ARITHMETIC = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "min": np.minimum, "max": np.maximum, "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}  # fmt: skip
_FLOATS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
           "min": np.minimum, "max": np.maximum}  # fmt: skip


class Block:
    """A block of a kernel while it runs.

    Args:
        kernel: its PTX.
        arguments: of its parameters in order, as ``ptx.arguments``; pointers to scratch memory may
            follow.
        values: of the numbers among them, by name.
        threads: of the block.
        grid: how many blocks there are; this is the first.

    Attributes:
        memory: what was found of shared memory, ``memory.faults``.
        executed: threads that executed an instruction, by its name.
        moved: bytes of global memory, by "read" and "written".
    """

    def __init__(self, kernel: Kernel, arguments: dict[str, Box | str], values: dict[str, int],
                 threads: int, grid: int = 1) -> None:  # fmt: skip
        self.kernel, self.threads, self.grid = kernel, threads, grid
        self.lane = np.arange(threads, dtype=np.int64)
        self.registers: dict[str, np.ndarray | None] = {}
        self.parameters, self.places, self.boxes = {}, {}, {}
        names = [*arguments, *("scratch",) * (len(kernel.parameters) - len(arguments))]
        for i, (parameter, name) in enumerate(zip(kernel.parameters, names, strict=True)):
            kind = arguments.get(name, "!tt.ptr")
            pointer = isinstance(kind, Box) or kind.startswith("!")
            if isinstance(kind, Box):
                self.boxes[i + 1] = kind
            self.places[parameter] = i + 1
            self.parameters[parameter] = (i + 1) << REGION if pointer else values.get(name, 16)
        self.memory = SharedMemory()
        self.executed: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    # --- operands

    def value(self, operand: str):
        """Of a register, a number or a name; None: not known."""
        operand = operand.strip()
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):
            return self._special(operand)
        if re.fullmatch(r"-?\d+", operand):
            return np.full(self.threads, int(operand), np.int64)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            return np.full(self.threads, int(operand[2:], 16), np.int64)
        if re.fullmatch(r"0x[0-9a-fA-F]+U?", operand):
            return np.full(self.threads, int(operand.rstrip("U"), 16), np.int64)
        if operand in self.parameters:  # its address
            return np.full(self.threads, self.places[operand], np.int64)
        if operand == "global_smem":
            return np.zeros(self.threads, np.int64)
        return None

    def _special(self, name: str):
        known = {"%tid.x": self.lane, "%ntid.x": self.threads, "%nctaid.x": self.grid,
                 "%laneid": self.lane % WARP, "%warpid": self.lane // WARP}  # fmt: skip
        if re.match(r"%(tid|ctaid|nctaid|ntid|laneid|warpid)", name):
            value = known.get(name, 1 if name.startswith("%n") else 0)
            return np.zeros(self.threads, np.int64) + value
        return None  # never written: a branch not taken would have

    def address(self, operand: str):
        """Of "[%r1+16]"."""
        inside = operand.strip("[] ")
        name, _, offset = inside.replace(" ", "").partition("+")
        base = self.value(name)
        return None if base is None else base + int(offset or 0)

    def predicate(self, name: str):
        """Of which threads; None: not known."""
        if not name:
            return np.ones(self.threads, bool)
        value = self.value(name.lstrip("!"))
        return None if value is None else (value == 0 if name[0] == "!" else value != 0)

    def write(self, operand: str, value, guard=None) -> None:
        """The threads of ``guard`` write a register, or those of a list, which then is unknown."""
        names = re.findall(r"%\w+", operand) or [operand]  # a predicate of inline code has no %
        for name in names:
            old = self.registers.get(name)
            if guard is not None and not guard.all() and value is not None:
                same = old is not None
                self.registers[name] = np.where(guard, value, old) if same else None
            elif guard is None or guard.all() or old is not None:
                self.registers[name] = value

    # --- execution

    def run(self) -> Block:
        """Runs to the kernel's return.

        Raises:
            Unreadable: a branch is unknown or not the same for all threads, or it does not return.
        """
        code, place = self.kernel.code, 0
        for _ in range(MOST):
            if place >= len(code):
                break
            instruction = code[place]
            root = instruction.name.split(".")[0]
            if root == "ret" and not instruction.guard:
                break
            place += 1
            if root == "bra":
                if self._taken(instruction):
                    place = self.kernel.labels[instruction.operands[0]]
                continue
            self._step(instruction, root)
        else:
            raise Unreadable(f"{self.kernel.name} does not return")
        self.memory.finish()
        return self

    def _taken(self, instruction: Instruction) -> bool:
        guard = self.predicate(instruction.guard)
        if guard is None or guard.any() != guard.all():
            what = "unknown" if guard is None else "not the same for all threads"
            raise Unreadable(f"line {instruction.line}: a branch is {what}")
        return bool(guard.all())

    def _step(self, instruction: Instruction, root: str) -> None:
        guard = self.predicate(instruction.guard)
        if guard is not None and not guard.any():
            return
        known = np.ones(self.threads, bool) if guard is None else guard
        self.executed[instruction.name] += int(known.sum())
        self.memory.at(instruction.line)
        if self.memory.sums and root != "wgmma":
            self.memory.reads_registers([name for way in instruction.registers for name in way])
        handler = getattr(self, f"_do_{root}", None)
        if handler:
            handler(instruction, known)
        elif instruction.operands and instruction.registers[0]:
            self.write(instruction.operands[0], self._computed(instruction, root), known)

    def _computed(self, instruction: Instruction, root: str):
        """Of arithmetic; None where it is not known."""
        name, sources = instruction.name, instruction.operands[1:]
        if any(o.startswith("{") for o in (*sources, instruction.operands[0])):
            return None
        values = [self.value(o) for o in sources]
        if any(v is None for v in values):
            return None
        if re.search(r"\.f(16|32|64)|bf16", name) and root not in ("mov", "selp", "cvt", "setp"):
            return self._float(root, name, values)
        bits, signed = _width(name), bool(re.search(r"\.s\d+", name))
        return self._integer(root, name, values, bits, signed)

    def _float(self, root: str, name: str, values: list):
        if not name.endswith("f32") or root not in _FLOATS or len(values) != 2:
            return None
        a, b = (v.astype(np.uint32).view(np.float32) for v in values)
        with np.errstate(all="ignore"):
            return _FLOATS[root](a, b).astype(np.float32).view(np.uint32).astype(np.int64)

    def _integer(self, root: str, name: str, values: list, bits: int, signed: bool):
        if root in ("min", "max", "div", "rem", "shr", "setp") and signed:
            values = [_signed(v, bits) for v in values]
        if root in _ARITHMETIC:
            return _wrap(_ARITHMETIC[root](*values), bits)
        if root in ("mul", "mad"):
            if ".wide" in name:
                values[:2] = [_signed(v, bits) if signed else v for v in values[:2]]
                bits = 2 * bits
            elif ".hi" in name:
                return None if bits > 32 else _wrap(values[0] * values[1] >> bits, bits)
            product = values[0] * values[1]
            return _wrap(product + values[2] if root == "mad" else product, bits)
        if root in ("shl", "shr"):
            by = np.minimum(values[1], 63)
            return _wrap(values[0] << by if root == "shl" else values[0] >> by, bits)
        if root == "setp":
            return self._compared(name, values)
        if root == "selp":
            return np.where(values[2] != 0, values[0], values[1])
        if root == "bfe":
            value = (values[0] >> values[1]) & ((1 << values[2]) - 1)
            lacks = 64 - values[2]
            return _wrap(value << lacks >> lacks, bits) if signed else value
        if root == "prmt":
            return _permuted(*values)
        if root in ("not", "neg"):
            value = ~values[0] if root == "not" else -values[0]
            return (values[0] == 0).astype(np.int64) if name == "not.pred" else _wrap(value, bits)
        if root in ("mov", "cvta"):
            return values[0]
        if root == "cvt":
            return self._converted(name, values[0])
        return None

    def _compared(self, name: str, values: list):
        if re.search(r"\.f\d+", name):
            values = [v.astype(np.uint32).view(np.float32) for v in values]
        return _COMPARE[name.split(".")[1]](*values[:2]).astype(np.int64)

    def _converted(self, name: str, value):
        to, source = re.findall(r"\.(\w?[busf]\d+\w*)", name)[-2:]
        if source.startswith(("s", "u")) and to == "f32":
            value = _signed(value, int(source[1:])) if source[0] == "s" else value
            return value.astype(np.float32).view(np.uint32).astype(np.int64)
        if source[0] not in "sub" or to[0] not in "sub":
            return None
        bits = int(source[1:])
        value = _signed(value, bits) if source[0] == "s" else _wrap(value, bits)
        return _wrap(value, int(to[1:]))

    # --- instructions of their own: registers

    def _do_ld(self, i: Instruction, guard) -> None:
        if i.name.startswith("ld.param"):
            name = i.operands[1].strip("[] ").split("+")[0]
            value = np.full(self.threads, self.parameters[name], np.int64)
            self.write(i.operands[0], value, guard)
            return
        self.write(i.operands[0], None, guard)
        self._access(i, i.operands[1], guard, "read")

    def _do_st(self, i: Instruction, guard) -> None:
        self._access(i, i.operands[0], guard, "written")

    def _access(self, i: Instruction, operand: str, guard, way: str) -> None:
        lanes = re.search(r"\.v(\d)", i.name)
        size = _width(i.name) // 8 * (int(lanes[1]) if lanes else 1)
        if ".global" in i.name:
            self.moved[way] += size * int(guard.sum())
        elif ".shared" in i.name:
            self._shared(i, operand, guard, way, size)

    def _shared(self, i: Instruction, operand: str, guard, way: str, size: int) -> None:
        address = self.address(operand)
        if address is None:
            raise Unreadable(f"line {i.line}: the address of a shared access is not known")
        self.memory.generic(address[guard], size, self.lane[guard] // WARP, way)

    def _matrix(self, i: Instruction, operand: str, guard, way: str) -> None:
        """ldmatrix, stmatrix: each 8 threads have the addresses of a matrix's rows."""
        count = int(re.search(r"\.x(\d)", i.name)[1])
        first = guard & (self.lane % WARP < 8 * count)
        self._shared(i, operand, first, way, 16)

    def _do_ldmatrix(self, i: Instruction, guard) -> None:
        self.write(i.operands[0], None, guard)
        self._matrix(i, i.operands[1], guard, "read")

    def _do_stmatrix(self, i: Instruction, guard) -> None:
        self._matrix(i, i.operands[0], guard, "written")

    def _do_elect(self, i: Instruction, guard) -> None:
        _, predicate = i.operands[0].split("|")
        self.write(predicate, (self.lane % WARP == 0).astype(np.int64))

    def _do_shfl(self, i: Instruction, guard) -> None:
        to = i.operands[0].split("|")[0]
        value, by = self.value(i.operands[1]), self.value(i.operands[2])
        if value is None or by is None:
            self.write(to, None)
            return
        lane = self.lane % WARP
        source = {"idx": by, "bfly": lane ^ by, "down": lane + by, "up": lane - by}
        of = np.clip(source[i.name.split(".")[2]], 0, WARP - 1)
        self.write(to, value[self.lane - lane + of])

    def _do_setp(self, i: Instruction, guard) -> None:
        value = self._computed(i, "setp")
        first, *second = i.operands[0].split("|")
        self.write(first, value, guard)
        for name in second:
            self.write(name, None if value is None else 1 - value, guard)

    # --- what orders accesses, and copies

    def _do_bar(self, i: Instruction, guard) -> None:
        if i.name.startswith("bar.warp"):
            return
        self.memory.barrier()

    _do_barrier = _do_bar

    def _do_fence(self, i: Instruction, guard) -> None:
        if i.name.startswith("fence.proxy.async"):
            self.memory.fence()

    def _do_mbarrier(self, i: Instruction, guard) -> None:
        kind = i.name.split(".")[1]
        if kind == "try_wait" or kind == "test_wait":
            self.registers[i.operands[0]] = np.ones(self.threads, np.int64)
            parity = self.value(i.operands[2])
            self.memory.wait(int(self.address(i.operands[1])[0]), int(parity[0]))
            return
        operand = next(o for o in i.operands if o.startswith("["))
        for address in self.address(operand)[guard]:
            if kind == "init":
                self.memory.new_mbarrier(int(address))
            elif kind == "arrive" and "expect_tx" in i.name:
                self.memory.expect(int(address), int(self.value(i.operands[-1])[0]))
            elif kind == "inval":
                self.memory.forget_mbarrier(int(address))
            elif kind != "arrive":
                raise Unreadable(f"line {i.line}: {i.name}")

    def _do_cp(self, i: Instruction, guard) -> None:
        name = i.name
        if name.startswith("cp.async.bulk.tensor"):
            self._tensor(i, guard)
        elif name.startswith("cp.async.bulk.commit_group"):
            self.memory.commit("store")
        elif name.startswith("cp.async.bulk.wait_group"):
            self.memory.wait_stores(int(i.operands[0]))
        elif name.startswith("cp.async.commit_group"):
            self.memory.commit("copy")
        elif name.startswith(("cp.async.wait_group", "cp.async.wait_all")):
            self.memory.wait_copies(int(i.operands[0]) if i.operands else 0)
        elif re.match(r"cp\.async\.c[ag]\.shared", name):
            address = self.address(i.operands[0])
            self.moved["read"] += int(i.operands[2], 0) * int(guard.sum())
            warps = self.lane[guard] // WARP
            self.memory.copy(address[guard], int(i.operands[2], 0), warps)
        else:
            raise Unreadable(f"line {i.line}: {name}")

    def _tensor(self, i: Instruction, guard) -> None:
        load = i.name.split(".")[5].startswith("shared")
        shared, described = i.operands[:2] if load else i.operands[1::-1]
        index = int(self.value(described.strip("[ ").split(",")[0])[0])
        box, addresses = self.boxes[index], self.address(shared)[guard]
        for place, address in enumerate(addresses):
            self.moved["read" if load else "written"] += box.message_bytes
            if load:
                barrier = int(self.address(i.operands[2])[guard][place])
                self.memory.load(int(address), box.message_bytes, barrier)
            else:
                self.memory.store(int(address), box.message_bytes)

    def _do_wgmma(self, i: Instruction, guard) -> None:
        kind = i.name.split(".")[1]
        if kind == "mma_async":
            self._multiply(i)
        elif kind == "commit_group":
            self.memory.commit("product")
        elif kind == "wait_group":
            self.memory.wait_products(int(i.operands[0]))

    def _multiply(self, i: Instruction) -> None:
        rows, columns = map(int, re.search(r"\.m(\d+)n(\d+)k", i.name).groups())
        sums = re.findall(r"%\w+", i.operands[0])
        first = np.arange(0, self.threads, 4 * WARP)  # of each warp group
        for operand, size in zip(i.operands[1:3], (rows, columns), strict=True):
            if operand.startswith("{"):
                continue  # in registers
            value = self.value(operand)
            if value is None:
                raise Unreadable(f"line {i.line}: a descriptor of shared memory is not known")
            for word in map(int, value[first]):
                swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[word >> 62 & 3]
                begin = (word & 0x3FFF) << 4
                self.memory.multiply(begin - begin % (8 * swizzle), size * swizzle)
        for name in sums:
            self.registers[name] = None
        self.memory.accumulate(sums)
