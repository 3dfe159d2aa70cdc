"""What nvcc spends on each kernel: registers, spills, shared memory, as its assembler tells with -v."""

from __future__ import annotations

import re

Resources = dict[str, int]
"""registers a thread; stack, spill_stores, spill_loads in bytes a thread; shared in bytes a block, static."""

_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


def parsed(text: str) -> dict[str, Resources]:
    """By kernel, what `ptxas -v` printed: "Used 39 registers, used 1 barriers, 8 bytes smem" and the line before."""
    found = {}
    for match in _ENTRY.finditer(text):
        shared = _SHARED.search(match["rest"])
        numbers = {name: int(match[name]) for name in ("registers", "stack", "spill_stores", "spill_loads")}
        found[match["kernel"]] = {**numbers, "shared": int(shared[1]) if shared else 0}
    return found
