"""Shared memory of a block whose kernel ``ptx_run.py`` runs: which copies and products are on
their way, who wrote what since the last barrier, and what nothing orders.

There are two proxies. Threads load and store through the generic one; TMA copies and ``wgmma`` go
through the async one, and see what threads wrote only after a barrier and ``fence.proxy.async``:
the writers' before the barrier, or after it that of the thread which asks for the copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BYTES = 228 * 1024


class Fault(NamedTuple):
    """line: of the PTX; rule: "bytes" of an mbarrier, "fence", "barrier" or "wait"."""

    line: int
    rule: str
    text: str


class Mbarrier:
    """A barrier that counts the bytes that copies bring."""

    def __init__(self, number: int) -> None:
        self.number, self.phase, self.expected, self.issued = number, 0, 0, 0


class SharedMemory:
    """Knows of each byte what is on its way. A group's number in ``storing``, ``copying`` or
    ``multiplied`` says that it was not waited for; 0: there is none.

    Attributes:
        faults: what was found.
        checked: how many times each rule was asked.
    """

    def __init__(self) -> None:
        self.loading, self.storing, self.copying, self.multiplied = (
            np.zeros(BYTES, np.int32) for _ in range(4)
        )
        # bits of warps since the last barrier, where that is, and of warps that copy
        self.readers, self.writers, self.copiers = (np.zeros(BYTES, np.int32) for _ in range(3))
        self.used: list = []
        self.unfenced, self.retired = (np.zeros(BYTES, bool) for _ in range(2))
        self.groups = {"store": 1, "copy": 1, "product": 1}  # that the next of them belong to
        self.mbarriers: dict[int, Mbarrier] = {}
        self.sums: dict[str, int] = {}  # registers that a product still writes
        self.faults: list[Fault] = []
        self.checked = {"bytes": 0, "fence": 0, "barrier": 0, "wait": 0}
        self.line, self.count = 0, 0

    def at(self, line: int) -> None:
        self.line = line

    def _check(self, rule: str, wrong, text: str) -> None:
        self.checked[rule] += 1
        if np.any(wrong):
            fault = Fault(self.line, rule, text)
            if fault not in self.faults:
                self.faults.append(fault)

    # --- threads

    def generic(self, address, size: int, warp, way: str) -> None:
        """Threads of these warps read or write ``size`` bytes each."""
        cells = address[:, None] + np.arange(size)
        bit = np.broadcast_to(np.int32(1) << warp[:, None].astype(np.int32), cells.shape)
        self.used.append(cells)
        self._check("wait", self.loading[cells] > 0, f"{way} before a TMA load is waited for")
        self._check("wait", self.copying[cells] > 0, f"{way} before a cp.async is waited for")
        others = self.writers[cells]
        if way == "written":
            self._may_be_overwritten(cells)
            others = others | self.readers[cells]
        self._check("barrier", others & ~bit, f"{way} with no barrier after another warp's access")
        if way == "written":
            np.bitwise_or.at(self.writers, cells, bit)
            self.unfenced[cells] = True
        else:
            np.bitwise_or.at(self.readers, cells, bit)

    def _may_be_overwritten(self, cells) -> None:
        self._check("wait", self.storing[cells] > 0, "overwritten while a TMA store reads it")
        self._check("wait", self.multiplied[cells] > 0, "overwritten while a product reads it")
        self._check("barrier", self.retired[cells], "overwritten with no barrier after a wait")

    def reads_registers(self, names) -> None:
        """Another instruction than a product uses these registers."""
        wrong = [name in self.sums for name in names]
        self._check("wait", wrong, "a product's sums are used before it is waited for")

    def barrier(self) -> None:
        for cells in self.used:
            self.readers[cells] = self.writers[cells] = 0
        self.used.clear()
        self.retired[:] = False

    def fence(self) -> None:
        self.unfenced[:] = False

    # --- groups

    def commit(self, kind: str) -> None:
        self.groups[kind] += 1

    def _done(self, kind: str, state, most: int):
        """The cells whose groups are done where ``most`` may be on their way."""
        done = (state > 0) & (state < self.groups[kind] - most)
        state[done] = 0
        return done

    def wait_stores(self, most: int) -> None:
        self.retired |= self._done("store", self.storing, most)

    def wait_products(self, most: int) -> None:
        self.retired |= self._done("product", self.multiplied, most)
        last = self.groups["product"] - most
        self.sums = {name: group for name, group in self.sums.items() if group >= last}

    def wait_copies(self, most: int) -> None:
        """cp.async writes as the threads do that asked for it."""
        done = self._done("copy", self.copying, most)
        self.used.append(done)
        self.writers[done] |= self.copiers[done]
        self.copiers[done] = 0
        self.unfenced |= done

    # --- copies and products

    def copy(self, address, size: int, warp) -> None:
        """cp.async by threads of these warps."""
        cells = address[:, None] + np.arange(size)
        bit = np.broadcast_to(np.int32(1) << warp[:, None].astype(np.int32), cells.shape)
        self._may_be_overwritten(cells)
        others = (self.readers[cells] | self.writers[cells]) & ~bit
        self._check("barrier", others, "a cp.async with no barrier after another warp's access")
        self._check("wait", (self.copying[cells] > 0) & (self.copiers[cells] != bit),
                    "two cp.async to the same bytes")  # fmt: skip
        self.copying[cells] = self.groups["copy"]
        np.bitwise_or.at(self.copiers, cells, bit)

    def load(self, address: int, size: int, barrier: int) -> None:
        """TMA to shared memory."""
        cells = slice(address, address + size)
        self._may_be_overwritten(cells)
        used = self.readers[cells] | self.writers[cells]
        self._check("barrier", used, "a TMA load with no barrier after a thread's access")
        self._check("fence", self.unfenced[cells], "a TMA load with no fence after a store")
        coming = (self.loading[cells] > 0) | (self.copying[cells] > 0)
        self._check("wait", coming, "a TMA load where another copy is on its way")
        self._check("bytes", barrier not in self.mbarriers, "a TMA load on no mbarrier")
        if barrier in self.mbarriers:
            self.loading[cells] = self.mbarriers[barrier].number
            self.mbarriers[barrier].issued += size

    def store(self, address: int, size: int) -> None:
        """TMA from shared memory."""
        cells = slice(address, address + size)
        self._read_async(cells, "a TMA store")
        self.storing[cells] = self.groups["store"]

    def multiply(self, address: int, size: int) -> None:
        """wgmma reads an operand."""
        cells = slice(address, address + size)
        self._read_async(cells, "wgmma")
        self.multiplied[cells] = self.groups["product"]

    def _read_async(self, cells, what: str) -> None:
        coming = (self.loading[cells] > 0) | (self.copying[cells] > 0)
        self._check("wait", coming, f"{what} reads before a copy is waited for")
        self._check("fence", self.unfenced[cells], f"{what} with no fence after a store")
        self._check("barrier", self.writers[cells], f"{what} with no barrier after a store")

    def accumulate(self, sums: list[str]) -> None:
        self.sums |= dict.fromkeys(sums, self.groups["product"])

    # --- mbarriers

    def new_mbarrier(self, address: int) -> None:
        self.generic(np.array([address]), 8, np.array([0]), "written")
        self.unfenced[address : address + 8] = False  # not a copy's data
        self.count += 1
        self.mbarriers[address] = Mbarrier(self.count)

    def forget_mbarrier(self, address: int) -> None:
        found = self.mbarriers.pop(address, None)
        if found:
            self._check("wait", self.loading == found.number, "an mbarrier is given up too early")

    def expect(self, address: int, size: int) -> None:
        self._check("bytes", address not in self.mbarriers, "bytes are expected on no mbarrier")
        if address in self.mbarriers:
            self.mbarriers[address].expected += size

    def wait(self, address: int, parity: int) -> None:
        """Until the phase of this parity is complete."""
        self._check("bytes", address not in self.mbarriers, "no mbarrier is waited for")
        found = self.mbarriers.get(address)
        if found is None or found.phase & 1 != parity:
            return  # the phase before
        said = f"an mbarrier expects {found.expected} bytes, and {found.issued} come"
        self._check("bytes", found.expected != found.issued or found.issued == 0, said)
        self.loading[self.loading == found.number] = 0
        found.phase += 1
        found.expected = found.issued = 0

    def finish(self) -> None:
        """The block is done."""
        self._check("wait", self.storing > 0, "a block is done while a TMA store reads its memory")
        self._check("wait", self.loading > 0, "a block is done while a TMA load is on its way")
