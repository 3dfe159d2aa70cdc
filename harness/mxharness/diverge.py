"""The first operator of a whole model's run whose output leaves its bound, and how far the run drifts layer by layer.

The kernels' decoder runs as it always does, on a device that shows every launch. Each is judged by its operator, from
the activations that the kernels themselves made and the weights of the checkpoint: an error is named where it arises
and nowhere after. Beside it the same tokens go through float32 on the same MXFP4 weights, which shows what the
roundings of all layers together do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mxharness import facts, mxfp4
from mxharness.device import host
from mxharness.errors import KernelFailure
from mxharness.execution import Execution
from mxharness.gate.defects import everything, quantised
from mxharness.judge import gates, judge
from mxharness.launches import Judgeable, judgeables, leads_astray
from mxharness.model import decoder, reference
from mxharness.model.checkpoint import values
from mxharness.op import Gate, Outcome
from mxharness.watched import Launch, Watched

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.config import ModelConfig
    from mxharness.model.decoder import Activations, Decoder

PRODUCTS = 1 << 28
"""Of a contraction so many products are judged: all rows of a small one, evenly spaced ones of a large one."""
PREDICTED = 1 << 23
"""The same for the products whose bits are predicted."""
_ROLES = {
    "embedding": "embedding",
    "rope": "rope",
    "kv_append": "kv append",
    "attention": "attention",
    "gated": "swiglu",
    "swiglu": "swiglu",
    "moe_route": "route",
    "moe_group": "group",
    "moe_combine": "combine",
}
"""Of kernels that multiply by no weight, by how their names begin; others are called after their weight."""


@dataclass(frozen=True)
class Step:
    """One launch, judged."""

    place: str
    """ "layer 3", "embedding", "final norm" or "head"."""
    role: str
    """ "qkv", "attention", "gate_up, expert 2"."""
    outcome: Outcome
    rows: tuple[int, int]
    """Judged, and of how many; (0, 0) where all are."""

    @property
    def diverged(self) -> bool:
        """Whether it left its bound; data that prove nothing are no divergence."""
        return not self.outcome.passed and not self.outcome.refused


@dataclass(frozen=True)
class Growth:
    """How far the kernels' states are from float32 on the same weights: |difference| / |reference|, Frobenius."""

    place: str
    """Normed states, before a layer's ffn or at the end."""
    relative: float


@dataclass(frozen=True)
class Report:
    """A run of a model, launch by launch."""

    model: str
    tokens: int
    activations: Activations
    device_class: str
    arithmetic: str
    steps: tuple[Step, ...]
    growth: tuple[Growth, ...]
    failure: str = ""
    """What a kernel failed with that did not end as it should, or left wrong indices; the run stops there."""

    @property
    def first(self) -> Step | None:
        """The first launch that left its bound."""
        return next((step for step in self.steps if step.diverged), None)

    @property
    def passed(self) -> bool:
        """Whether every launch stayed within its bound."""
        return self.first is None and not self.failure

    def to_json(self) -> dict[str, Any]:
        """Everything; of a launch what a table shows of it."""
        first = self.first
        return {
            "model": self.model,
            "tokens": self.tokens,
            "activations": self.activations,
            "device_class": self.device_class,
            "arithmetic": self.arithmetic,
            "passed": self.passed,
            "failure": self.failure,
            "first": _row(first) if first else None,
            "diverged": sum(step.diverged for step in self.steps),
            "steps": [_row(step) for step in self.steps],
            "growth": [{"place": each.place, "relative": each.relative} for each in self.growth],
        }


def _row(step: Step) -> dict[str, Any]:
    outcome = step.outcome
    kept = ("op", "case", "gate", "passed", "refused", "elements", "bad", "ratio", "message")
    return {"place": step.place, "role": step.role, "rows": step.rows, **{n: getattr(outcome, n) for n in kept}}


@dataclass
class _Judging:
    """What has been seen of a run."""

    device: Device
    right: Mapping[int, tuple[str, torch.Tensor]]
    """By address on the device: a weight's name and what it must be."""
    steps: list[Step] = field(default_factory=list)
    states: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """Normed states before every ffn, and at the end."""
    place: str = "embedding"

    def see(self, launch: Launch, addresses: Mapping[str, int]) -> None:
        """Judge a launch from the right weights. KernelFailure where the run cannot go on from what it left."""
        wrong, given = [], dict(launch.given)
        names = []
        for parameter, address in addresses.items():
            name, right = self.right.get(address, ("", None))
            here = given[parameter]
            if right is None or not isinstance(here, torch.Tensor) or here.shape != right.shape:
                continue
            names.append(name)
            if places := _differing(here, right):
                wrong.append(f"{name} on the device is not the checkpoint's: {places}")
            given[parameter] = right
        self.place, role = _named(launch.kernel, names, self.place)
        judged = Launch(launch.kernel, given, launch.left)
        for part in judgeables(judged, PRODUCTS):
            self._judge(part, role, {"exact", "bound"}, tuple(wrong))
        if self.device.arithmetic == "tensor-core":  # else nobody knows the bits
            for part in judgeables(judged, PREDICTED):
                if part.work <= PREDICTED:
                    self._judge(part, role, {"predicted"}, tuple(wrong))
        if role in ("ffn_norm", "final_norm"):
            self.states.append((self.place, launch.left["y"].float()))
        if leads_astray(judged):
            raise KernelFailure("the run ends here, since later kernels would read and write where its indices lead")

    def _judge(self, part: Judgeable, role: str, wanted: set[Gate], wrong: tuple[str, ...]) -> None:
        fact = facts.find(self.device.device_class)
        healthy = not any(step.diverged for step in self.steps)
        for gate in wanted.intersection(gates(part.op, part.case, fact)):
            outcome = judge(
                part.op, part.case, gate, self.device.device_class, part.inputs, Execution(part.outputs, wrong),
                self.device if healthy and part.whole else None,
            )  # fmt: skip
            message = outcome.message.partition("; paste into ")[0]  # no case has these inputs
            outcome = replace(outcome, message=message)
            self.steps.append(Step(self.place, f"{role}, {part.part}" if part.part else role, outcome, part.rows))


def run(
    checkpoint: Checkpoint,
    device: Device,
    ids: torch.Tensor,
    activations: Activations = "fp16",
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Run the kernels' decoder over ids (1, T) int64 on the CPU and judge every launch. progress: called after each.

    Raises UserError as `decoder.build`, and for a kernel that has no reference.
    """
    return of_decoder(decoder.build(checkpoint, device, activations), checkpoint, ids, activations, progress=progress)


def of_decoder(
    model: Decoder,
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    activations: Activations = "fp16",
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """As `run`, for a decoder that is on a device already and was built of the checkpoint."""
    right = decoder.build(quantised(checkpoint, everything), host.open_device(), activations)  # nothing but uploads
    known: dict[int, tuple[str, torch.Tensor]] = {}
    for (name, here), (_, there) in zip(_weights(model), _weights(right), strict=True):
        known.setdefault(here.data_ptr(), (name, there))  # a tied head is the embedding
    judging = _Judging(model.device, known)

    def see(launch: Launch, addresses: Mapping[str, int]) -> None:
        judging.see(launch, addresses)
        progress(1)

    watched = decoder.runner(replace(model, device=Watched(model.device, see)))
    failure = ""
    try:
        watched.logits(watched.hidden_states(ids).flatten(0, 1))
    except KernelFailure as error:
        failure = f"{judging.place}, after {judging.steps[-1].role if judging.steps else 'nothing'}: {error}"
    return Report(
        model=checkpoint.name,
        tokens=ids.numel(),
        activations=activations,
        device_class=model.device.device_class,
        arithmetic=model.device.arithmetic,
        steps=tuple(judging.steps),
        growth=tuple(_growth(checkpoint, ids, judging.states, model.device.torch_device)),
        failure=failure,
    )


def _weights(part: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a decoder by its name: "layers.3.qkv.codes"."""
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, mxfp4.Quantized):
        for what, tensor in part._asdict().items():
            yield f"{name}.{what}", tensor
    elif isinstance(part, tuple):
        for i, one in enumerate(part):
            yield from _weights(one, f"{name}.{i}")
    elif is_dataclass(part):
        for each in fields(part):
            yield from _weights(getattr(part, each.name), f"{name}.{each.name}" if name else each.name)


def _named(kernel: str, weights: list[str], place: str) -> tuple[str, str]:
    """Where a launch belongs and what it is, from its weights' names; without any it belongs where the last one did."""
    role = next((name for begin, name in _ROLES.items() if kernel.startswith(begin)), "")
    for name in weights:
        parts = name.split(".")
        if parts[0] == "layers":
            place = f"layer {parts[1]}"
            role = role or next(part for part in parts[2:] if part != "ffn")
        elif parts[0] in ("embedding", "head", "final_norm") and role != "embedding":
            place = role = "head" if parts[0] == "embedding" else parts[0]
    return place, role


def _differing(here: torch.Tensor, right: torch.Tensor) -> str:
    """How many elements have other bits, and the first of them; empty where none has."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[right.element_size()]
    other = (here.contiguous().view(bits) != right.contiguous().view(bits)).nonzero()
    return f"{len(other)} of {right.numel()} elements differ, the first at {other[0].tolist()}" if len(other) else ""


def _growth(
    checkpoint: Checkpoint, ids: torch.Tensor, states: list[tuple[str, torch.Tensor]], where: torch.device
) -> Iterator[Growth]:
    """The kernels' normed states against float32 torch's on the same MXFP4 weights."""
    tensors = quantised(checkpoint, everything).tensors
    weights = {name: values(stored).to(where) for name, stored in tensors.items()}
    normed: list[torch.Tensor] = []

    def ffn(config: ModelConfig, layer: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        normed.append(x.cpu())
        return reference.feed_forward(config, layer, x)

    with torch.inference_mode():
        normed.append(reference.hidden_states(checkpoint.config, weights, ids.to(where), ffn).flatten(0, 1).cpu())
    for (place, state), right in zip(states, normed, strict=False):  # a run that failed has fewer
        yield Growth(place, float((state - right).norm() / right.norm()))
