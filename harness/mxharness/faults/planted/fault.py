"""What a planted fault is: a change to a kernel's text, to a layout or to a function, and what must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelChange:
    """In kernels/`file`, `old` (which occurs once) becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class LayoutChange:
    """In mxfp4.LAYOUTS[`layout`], `field` becomes `value`."""

    layout: str
    field: str
    value: str


@dataclass(frozen=True)
class FunctionChange:
    """In the text of a Python function, `old` (which occurs once) becomes `new`."""

    module: str
    """For example "mxharness.functional.moe"."""
    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """One bug to plant."""

    name: str
    seen_in: str
    symptom: str
    change: KernelChange | LayoutChange | FunctionChange
    op: str
    """Operator whose cases are run."""
    detector: str
    """The check that must fail first: a gate, "memory" for writes outside an output, "crash" for no output at all."""
    also: FunctionChange | KernelChange | None = None
    """The reference makes the same mistake: whoever wrote the kernel wrote it, too, or blessed what came out. Or the
    mistake's other half."""
    pattern: str = ""
    """What the failing check's message must say about the place or kind of the fault; empty where it cannot know."""
    on_gpu: str = ""
    """The check that must fail first on a GPU, which has no guard pages, where it is another one."""
    undefined: bool = False
    """Undefined behaviour on a GPU, which may happen to give the right result (a race that is won, a barrier that does
    not wait for threads that have returned): planted on the host device always, whose scheduler makes it show."""
