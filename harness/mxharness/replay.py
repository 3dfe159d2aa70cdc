"""Judge a saved failure again: on the saved inputs, by the saved rule or another, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mxharness import facts
from mxharness.errors import UserError
from mxharness.execution import as_bytes, execute
from mxharness.judge import digest, gates, judge
from mxharness.op import Outcome, Tensors, Tolerance
from mxharness.repro import Saved

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device

_BOUNDED = ("bound", "composed")


@dataclass(frozen=True)
class Replay:
    """What became of a saved failure."""

    outcome: Outcome
    same_outputs: bool
    """Bit for bit those that were saved; every NaN counts as the same."""
    first_line: str
    """Begins with PASS or FAIL, and says by which rule."""
    notes: tuple[str, ...]
    """Inputs, outputs, kernels and tolerance, each against what was saved."""


def replay(saved: Saved, device: Device, *, scale: float | None = None, unit_roundoff: float | None = None) -> Replay:
    """Run the production kernel on the saved inputs and judge it under the saved gate.

    scale: the whole bound times this. unit_roundoff: another one of the accumulation. UserError where the gate
    compares bits and there is no bound, and where too little is known of the device for the gate.
    """
    tolerance, rule = _rule(saved, scale, unit_roundoff)
    if saved.gate not in gates(saved.op, saved.case, facts.find(device.device_class)):
        raise UserError(f"gate {saved.gate} cannot be judged here: {facts.lacking(device.device_class)}")
    op = replace(saved.op, tolerance=tolerance)
    execution = execute(op, saved.case, device, saved.inputs)
    outcome = judge(op, saved.case, saved.gate, device.device_class, saved.inputs, execution, device)
    same = digest(execution.outputs) == saved.outcome.digest
    where = f"{saved.case} under {saved.gate} on {device.device_class}"
    by = f" with {rule}" if rule else ""
    found = "passes" if outcome.passed else "still fails"
    return Replay(
        outcome=outcome,
        same_outputs=same,
        first_line=f"{'PASS' if outcome.passed else 'FAIL'}: {where} {found}{by}; it failed on {saved.outcome.device}",
        notes=(
            _inputs_note(saved),
            _outputs_note(saved, execution.outputs, same=same),
            _kernels_note(saved),
            _tolerance_note(saved, tolerance, rule),
        ),
    )


def _rule(saved: Saved, scale: float | None, unit_roundoff: float | None) -> tuple[Tolerance, str]:
    """The tolerance to judge by and, where it is not the saved one, what is different in words."""
    if scale is None and unit_roundoff is None:
        return saved.tolerance, ""
    if saved.gate not in _BOUNDED:
        raise UserError(
            f"gate {saved.gate} compares bits and has no bound; leave --scale-bound and --unit-roundoff out"
        )
    if scale is not None and unit_roundoff is not None:
        raise UserError("--scale-bound and --unit-roundoff are two answers to one question; give one")
    if scale is not None:
        return replace(saved.tolerance, scale=saved.tolerance.scale * scale), f"the bound times {scale:g}"
    if unit_roundoff is not None and unit_roundoff != saved.tolerance.unit_roundoff:
        changed = f"unit roundoff {unit_roundoff:.3g} instead of {saved.tolerance.unit_roundoff:.3g}"
        return replace(saved.tolerance, unit_roundoff=unit_roundoff), changed
    return saved.tolerance, ""


def _inputs_note(saved: Saved) -> str:
    if not saved.other_inputs:
        return "inputs: as saved; the case makes the same bytes here"
    return f"inputs: as saved; from the case this version makes another {', '.join(saved.other_inputs)}"


def _outputs_note(saved: Saved, outputs: Tensors, *, same: bool) -> str:
    device = saved.outcome.device
    if same:
        return f"outputs: the bits that were saved on {device}" if outputs else f"outputs: none, as on {device}"
    if not outputs or not saved.outcome.elements:
        return f"outputs: some now, none on {device}" if outputs else f"outputs: none now, some on {device}"
    parts = []
    for name, tensor in outputs.items():
        before = saved.outputs.get(name)
        if before is not None and (before.shape, before.dtype) == (tensor.shape, tensor.dtype):
            count = _different(before, tensor)
            parts += [f"{count} of {tensor.numel()} elements of {name}"] if count else []
    return f"outputs: other bits than on {device}" + (f": {', '.join(parts)}" if parts else "")


def _different(before: torch.Tensor, after: torch.Tensor) -> int:
    """Elements with other bits; every NaN counts as the same."""
    size = before.element_size()
    other = (as_bytes(before).reshape(-1, size) != as_bytes(after).reshape(-1, size)).any(1)
    if before.is_floating_point():
        other &= ~(before.isnan() & after.isnan()).flatten()
    return int(other.sum())


def _kernels_note(saved: Saved) -> str:
    from mxharness.device.source import shipped
    from mxharness.environment import source_hashes

    def used(hashes: dict[str, str]) -> dict[str, str]:
        own = f"kernels/{saved.op.source}"
        return {name: value for name, value in hashes.items() if name == own or not name.endswith(".cu")}

    now = used(source_hashes(shipped().folder()))
    then = used({name: value for name, value in saved.environment.items() if name.startswith("kernels/")})
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    return f"kernels: changed since: {', '.join(changed)}" if changed else "kernels: as when it failed"


def _tolerance_note(saved: Saved, used: Tolerance, rule: str) -> str:
    today = saved.op.tolerance.unit_roundoff
    note = f"tolerance: {rule or 'as saved'}"
    if saved.gate in _BOUNDED and used.unit_roundoff != today:
        note += f"; {saved.op.name} is judged with --unit-roundoff {today!r} today"
    return note
