"""A failing check as a small folder: what is needed to judge it again, anywhere.

case.json holds the case, the gate, the tolerance, the verdict, the environment and the kernels' hashes;
inputs.safetensors the packed tensors as the kernel got them, outputs.safetensors what it gave. No kernel text: a folder
from somebody else is data and never compiled, never unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.document import API_VERSION, json_ready, read_document
from mxharness.errors import UserError
from mxharness.execution import as_bytes
from mxharness.judge import digest, gates
from mxharness.mxfp4 import LAYOUTS
from mxharness.op import Case, Gate, Op, Outcome, Tensors, Tolerance
from mxharness.record import outcome_of
from mxharness.regimes import DTYPES

if TYPE_CHECKING:
    from mxharness.device import Device

FOLDER = "failures"
CASE, INPUTS, OUTPUTS, HOW = "case.json", "inputs.safetensors", "outputs.safetensors", "how.txt"
LIMIT = 16 << 20
"""Bytes of tensors in one file. What is larger is left out, the largest first, and the case makes it again."""
_HEADER = 1 << 20
_LONGEST_NAME = 180
_LARGEST = 2**28
"""Of two sizes of a case multiplied: larger ones are not made from a file that anybody may have written."""


@dataclass(frozen=True)
class Saved:
    """A failing check, read back."""

    folder: Path
    op: Op
    """The production operator, with today's tolerance."""
    case: Case
    gate: Gate
    tolerance: Tolerance
    """That it was judged by."""
    outcome: Outcome
    """The verdict that was saved."""
    inputs: Tensors
    outputs: Tensors
    """What was saved of them: those that were too large are missing."""
    other_inputs: tuple[str, ...]
    """Inputs of which this version makes other bytes from the same case."""
    environment: Mapping[str, str]


def save(
    folder: Path,
    name: str,
    op: Op,
    case: Case,
    gate: Gate,
    device: Device,
    inputs: Tensors,
    outputs: Tensors,
    outcome: Outcome,
) -> Path:
    """Write folder/`name` (made safe for a file system), in one move, over what an earlier failure left there.

    Of the device's kernels only the hashes are written.
    """
    import safetensors.torch

    kept_inputs, large_inputs = _within_limit(inputs)
    kept_outputs, large_outputs = _within_limit(outputs)
    document = {
        "api_version": API_VERSION,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "check": name,
        "case": asdict(case),
        "gate": gate,
        "tolerance": asdict(op.tolerance),
        "outcome": asdict(outcome),
        "left_out": {"inputs": large_inputs, "outputs": large_outputs},
        "environment": _environment(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder, prefix=".new."))
    try:
        fresh.chmod(0o755)
        (fresh / CASE).write_text(json.dumps(json_ready(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (fresh / INPUTS).write_bytes(safetensors.torch.save(kept_inputs))
        (fresh / OUTPUTS).write_bytes(safetensors.torch.save(kept_outputs))
        (fresh / HOW).write_text(f"In this folder: mxharness replay .   ({case}, gate {gate})\n", encoding="utf-8")
        return _move(fresh, folder / safe_name(name))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def keep(
    folder: Path,
    name: str,
    op: Op,
    case: Case,
    gate: Gate,
    device: Device,
    inputs: Tensors,
    outputs: Tensors,
    outcome: Outcome,
) -> Outcome:
    """Save a failure; its message then ends with the command that judges it again.

    A folder that cannot be written is said there and hides no verdict.
    """
    try:
        end = command(save(folder, name, op, case, gate, device, inputs, outputs, outcome))
    except OSError as error:
        end = f"not saved in {folder}: {error.strerror or error}"
    return replace(outcome, message=f"{outcome.message}; {end}")


def command(folder: Path) -> str:
    """What to type to judge the folder again, from the working directory."""
    here = Path.cwd()
    shown = folder.absolute()
    return f"mxharness replay {shlex.quote(str(shown.relative_to(here) if shown.is_relative_to(here) else shown))}"


def safe_name(name: str) -> str:
    """`name` as one folder's name; a hash follows where it had to be changed, so that no two names become one."""
    safe = re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.")[:_LONGEST_NAME]
    return safe if safe == name else f"{safe}-{sha256(name.encode()).hexdigest()[:8]}"


def load(folder: Path) -> Saved:
    """Read what `save` wrote. UserError, one sentence, for anything that is not such a folder or does not fit."""
    from mxharness.ops import find

    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; a failing check names the one it saved")
    path = _file(folder, CASE, _HEADER)
    try:
        document = read_document(path, "failure")
        case = _case(document["case"])
        gate, tolerance = document["gate"], _tolerance(document["tolerance"])
        outcome = outcome_of(document["outcome"])
        large = [str(name) for name in document["left_out"]["inputs"]]
        environment = {str(key): str(value) for key, value in dict(document["environment"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a complete failure ({type(error).__name__}: {error})") from error
    try:
        op = find(case.op)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if gate not in gates(op, case):
        raise UserError(f"{path}: no gate {gate!r} for {case}; there are {', '.join(gates(op, case))}")
    made = _made(op, case, path)
    saved = _tensors(_file(folder, INPUTS, 2 * LIMIT))
    inputs = {**{name: tensor for name, tensor in made.items() if name in large}, **saved}
    _check_forms(inputs, made, folder / INPUTS, case)
    if digest(inputs) != outcome.inputs:
        why = f"; {', '.join(large)} were left out and this version makes others" if large else ": it was changed"
        raise UserError(f"{folder / INPUTS} is not what {CASE} says{why}")
    return Saved(
        folder=folder,
        op=op,
        case=case,
        gate=gate,
        tolerance=tolerance,
        outcome=outcome,
        inputs=inputs,
        outputs=_tensors(_file(folder, OUTPUTS, 2 * LIMIT)),
        other_inputs=tuple(
            name for name in inputs if not as_bytes(inputs[name]).equal(as_bytes(made[name].cpu().contiguous()))
        ),
        environment=environment,
    )


def _within_limit(tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """Copies of the tensors that fit LIMIT together, and the names of those that do not, the largest."""
    kept, left_out, total = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].numel() * item[1].element_size()):
        total += tensor.numel() * tensor.element_size()
        if total > LIMIT:
            left_out.append(name)
        else:
            kept[name] = tensor.contiguous().clone()
    return kept, left_out


def _environment(device: Device) -> dict[str, str]:
    from mxharness.device import cuda, host

    machine = _machine(device.sources.folder(), host.FLAGS if device.name == "host" else cuda.FLAGS)
    here = {"device": device.name, "device class": device.device_class, "arithmetic": device.arithmetic}
    return machine | here


@cache
def _machine(kernels: Path, flags: tuple[str, ...]) -> dict[str, str]:
    """Asked once a process: it calls other programs."""
    from mxharness import environment

    return environment.describe(None, kernels, flags)


def _move(fresh: Path, target: Path) -> Path:
    """`fresh` at `target`, whose former content goes; a reader sees the one or the other, never half of one."""
    while True:
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".old."))
        with suppress(FileNotFoundError):
            target.rename(aside / target.name)
        try:
            fresh.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # another process was in between; its folder gives way to this one
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target


def _file(folder: Path, name: str, limit: int) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} is not a saved failure: it has no {name}")
    if path.stat().st_size > limit:
        raise UserError(f"{path} is larger than the {limit >> 20} MiB that are ever saved")
    return path


def _tensors(path: Path) -> Tensors:
    import safetensors.torch

    try:
        found: Tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    except Exception as error:  # a library's own error, or whatever a hostile header makes it raise
        raise UserError(f"{path} is no whole safetensors file ({error})") from error
    return found


def _case(values: Mapping[str, Any]) -> Case:
    """Raises KeyError, TypeError or ValueError for what is no case."""
    names = {field.name for field in fields(Case)}
    if set(values) != names:
        raise ValueError(f"a case has {', '.join(sorted(names))}")
    case = Case(**{**values, "shape": tuple(values["shape"]), "options": tuple(values["options"])})
    texts = (case.op, case.regime, case.dtype, case.layout, *case.options)
    numbers = (*case.shape, case.seed)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError("a case's sizes and seed are whole numbers, all else is text")
    if case.dtype not in DTYPES or case.layout not in LAYOUTS:
        raise ValueError(f"no dtype '{case.dtype}' or no layout '{case.layout}'")
    largest = sorted(case.shape)[-2:]
    if not largest or min(case.shape) < 0 or largest[0] * largest[-1] > _LARGEST:
        raise ValueError(f"no kernel is run on sizes {list(case.shape)}")
    return case


def _tolerance(values: Mapping[str, Any]) -> Tolerance:
    """Raises KeyError, TypeError or ValueError for what is no tolerance."""
    read: dict[str, Any] = {
        field.name: float(values[field.name]) if field.type == "float" else str(values[field.name])
        for field in fields(Tolerance)
    }
    return Tolerance(**read)


def _made(op: Op, case: Case, path: Path) -> Tensors:
    """What the operator makes of the case."""
    if len(case.shape) != len(op.axes.split()):
        raise UserError(f"{path}: {op.name} has sizes {op.axes}, the case has {len(case.shape)}")
    try:
        return op.make_inputs(case)
    except Exception as error:  # whatever an impossible case makes an operator's own generator raise
        raise UserError(f"{path}: {op.name} cannot make {case!r} ({type(error).__name__}: {error})") from error


def _check_forms(inputs: Tensors, made: Tensors, path: Path, case: Case) -> None:
    """Names, dtypes and shapes before a kernel trusts them."""
    if set(inputs) != set(made):
        raise UserError(f"{path} holds {', '.join(sorted(inputs)) or 'nothing'}; {case} has {', '.join(sorted(made))}")
    for name, tensor in inputs.items():
        got, want = ((tuple(one.shape), one.dtype) for one in (tensor, made[name]))
        if got != want:
            raise UserError(f"{path}: {name} is {got[0]} {got[1]}, {case} takes {want[0]} {want[1]}")
