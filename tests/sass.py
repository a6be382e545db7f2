"""What a kernel's machine code (SASS) costs: instructions along its paths, read from nvdisasm's listing.

A path is the shortest way through given basic blocks, so code that the common case jumps over is not counted.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
JUMP = re.compile(r"(?P<guard>@!?U?P\w+ )?BRA(?P<kind>[.\w]*) (?P<condition>[^`]*)`\((?P<target>\.L_x_\d+)\)")
ENDS = re.compile(r"(EXIT|RET|BPT)\b")


def nvdisasm() -> str | None:
    """The disassembler: on PATH, in the folder that CUDA_HOME names, or in Triton's wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [None, str(Path(home) / "bin")]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next((found for folder in folders if (found := shutil.which("nvdisasm", path=folder))), None)


@dataclass
class Block:
    """Instructions of which all run if the first does, and the blocks that may follow."""

    code: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        return sum(bool(re.match(rf"(@!?U?P\w+ )?{re.escape(opcode)}(\.|\s|$)", line)) for line in self.code)


@dataclass(frozen=True)
class Way:
    """A way through the blocks: each counted as often as it is entered."""

    blocks: tuple[int, ...]
    instructions: int


class Kernel:
    """The blocks of one kernel; block 0 is its entry."""

    def __init__(self, listing: list[str]) -> None:
        self.blocks = [Block()]
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        for line in listing:
            if match := LABEL.match(line):
                self._begin(falls_through=True)
                labels[match[1]] = len(self.blocks) - 1
            elif match := INSTRUCTION.match(line):
                code = match[1]
                self.blocks[-1].code.append(code)
                if jump := JUMP.match(code):
                    jumps.append((len(self.blocks) - 1, jump["target"]))
                    is_conditional = bool(jump["guard"] or jump["condition"].strip() or ".DIV" in jump["kind"])
                    self._begin(falls_through=is_conditional)
                elif ENDS.match(re.sub(r"^@!?U?P\w+ ", "", code)):
                    self._begin(falls_through=code.startswith("@"))
        for source, target in jumps:
            self.blocks[source].after.append(labels[target])

    def _begin(self, *, falls_through: bool) -> None:
        if self.blocks[-1].code or not falls_through:
            if falls_through:
                self.blocks[-1].after.append(len(self.blocks))
            self.blocks.append(Block())

    @property
    def code(self) -> list[str]:
        return [line for block in self.blocks for line in block.code]

    def path(self, *stops: int) -> Way | None:
        """The shortest way from the first block through the others in order; the first block is not counted."""
        blocks: tuple[int, ...] = ()
        total = 0
        for source, target in pairwise(stops):
            leg = self._leg(source, target)
            if leg is None:
                return None
            blocks += leg.blocks
            total += leg.instructions
        return Way(blocks, total)

    def loop(self, block: int) -> Way | None:
        """The shortest way from a block back to itself."""
        return self.path(block, block)

    def _leg(self, source: int, target: int) -> Way | None:
        queue: list[tuple[int, tuple[int, ...]]] = [
            (len(self.blocks[n].code), (n,)) for n in self.blocks[source].after
        ]
        queue.sort()
        seen: set[int] = set()
        while queue:
            cost, way = heappop(queue)
            if way[-1] == target:
                return Way(way, cost)
            if way[-1] in seen:
                continue
            seen.add(way[-1])
            for following in self.blocks[way[-1]].after:
                heappush(queue, (cost + len(self.blocks[following].code), (*way, following)))
        return None


def kernels(cubin: Path, disassembler: str | Path | None = None) -> dict[str, Kernel]:
    """Every function of a compiled file by its mangled name; ``disassembler``: if not the one that is found."""
    disassembler = disassembler or nvdisasm()
    assert disassembler is not None
    done = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True)
    listings: dict[str, list[str]] = {}
    current: list[str] = []
    for line in done.stdout.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            current = listings.setdefault(match[1], [])
        else:
            current.append(line)
    return {name: Kernel(listing) for name, listing in listings.items()}
