"""Records: what is tested (Case, Op), by which rule (Tolerance, Expected), and what came out (Outcome).

Nothing here computes; every module may import it. Shapes use one alphabet throughout the project:
M tokens, N output features, K contraction length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from mxharness.device import Device

Tensors = Mapping[str, "torch.Tensor"]

Gate = Literal["exact", "exact-arithmetic", "predicted", "bound", "composed"]
"""Which rule judged an element.

exact             bit for bit against a reference that rounds once: decoders, packers, gathers
exact-arithmetic  every sum whose inputs are chosen so that no partial sum rounds; any order must give the same bits
predicted         bit for bit against the model of the tensor core and the declared accumulation order
bound             |y - reference| <= an a-priori bound, element by element, stage by stage: the reference of a later
                  stage takes the kernel's own earlier output as its exact input
composed          the whole function in float64 from the inputs alone, with the roundings of all stages propagated
"""

GATES: tuple[Gate, ...] = get_args(Gate)


@dataclass(frozen=True, order=True)
class Case:
    """One reproducible experiment. `str(case)` is its pytest id; `repr(case)` can be pasted into CASES."""

    op: str
    shape: tuple[int, ...]
    """Sizes in the order of the operator's `axes`, for example (M, N, K)."""
    regime: str = "normal"
    """Name of the input distribution, see regimes.py."""
    dtype: str = "bf16"
    """Activation or output dtype: fp32, bf16 or fp16."""
    layout: str = "linear"
    """Packing of the MXFP4 weights, a key of mxfp4.LAYOUTS."""
    seed: int = 0
    options: tuple[str, ...] = ()
    """What else the operator needs, for example ("bias",). Sorted."""

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        layout = () if self.layout == "linear" else (self.layout,)
        return "-".join((self.op, sizes, self.dtype, self.regime, *layout, *self.options, f"s{self.seed}"))

    def option(self, name: str) -> str | None:
        """What follows "name=" in the options; "" for an option that is the name alone, None where there is none."""
        found = [text.partition("=")[2] for text in self.options if text.partition("=")[0] == name]
        return found[0] if found else None

    def __repr__(self) -> str:
        parts = [f'"{self.op}"', repr(self.shape)]
        for name, default in (
            ("regime", "normal"),
            ("dtype", "bf16"),
            ("layout", "linear"),
            ("seed", 0),
            ("options", ()),
        ):
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}".replace("'", '"'))
        return f"Case({', '.join(parts)})"


@dataclass(frozen=True)
class Expected:
    """The reference for one output tensor."""

    value: torch.Tensor
    """float64, from the decoded weights and the exact kernel inputs; the output's own dtype where the gate is exact."""
    magnitude: torch.Tensor | None = None
    """float64, same shape: the sum of |terms| that the rounding error is proportional to. None: the output is exact."""
    chain: int = 0
    """Length n of the longest chain of roundings behind one element, for gamma_n."""
    dtype: torch.dtype | None = None
    """Of the output; None: the value's own."""
    slack: torch.Tensor | None = None
    """float64, same shape: what the roundings of earlier stages may add to the bound (bounds.py)."""
    quantum: torch.Tensor | None = None
    """float64, same shape: a power of two of which every term of the sum is an integer multiple; None: no plain sum.
    Partial sums of integers are exact while the magnitude stays within what the device adds exactly (facts.py)."""
    permitted: torch.Tensor | None = None
    """bool (M, V): the output holds M ids below V, and these are right: more than one where the choice hangs on less
    than the rounding error of what was compared. `value` is the reference's own choice."""


@dataclass(frozen=True)
class Tolerance:
    """How far an element may be from its reference, and why.

    bound = gamma_n * magnitude + u_out * |reference| * (1 + gamma_n) + eta, with
    gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability, 2nd ed., section 3.1), u the unit roundoff of
    the accumulation, u_out and eta unit roundoff and smallest subnormal of the output dtype.
    An exact operator has unit_roundoff 0: nothing is allowed.
    """

    why: str
    """What the roundings are, in words; part of every message."""
    unit_roundoff: float = 0.0
    source: str = ""
    ceiling: float = 0.0
    """Largest median bound/|reference| of a case that still proves something; past it the case is refused."""
    composed_ceiling: float = 0.0
    """The same for the whole function, whose bound carries every intermediate rounding."""
    scale: float = 1.0
    """Factor on the whole bound: 1, but in the replay of a failure that asks how far off it is (replay.py)."""
    devices: str = "host, sm_90"
    """Device classes that it was derived for, whose tensor core docs/tensor_core.md describes."""

    @property
    def provenance(self) -> dict[str, str]:
        """Everything that the tolerance is made of, as text: what a baseline stores and a comparison shows."""
        formula = "gamma_n magnitude + slack + u_out (|reference| (1 + gamma_n) + slack) + eta"
        return {
            "formula": formula if self.unit_roundoff else "bit for bit",
            "unit roundoff": f"{self.unit_roundoff:g}",
            "ceiling": f"{self.ceiling:g}",
            "ceiling of the whole function": f"{self.composed_ceiling:g}",
            "why": self.why,
            "source": self.source,
            "devices": self.devices,
        }


@dataclass(frozen=True)
class Operand:
    """An input with which an output is contracted: zeroing a part of it takes that part of K out of the sum."""

    name: str
    """Of the input; MXFP4 codes in bytes, or numbers."""
    dims: int = 1
    """How many of its last dimensions together are K."""


ONE_STAGE: Mapping[Gate, str] = {"composed": "one stage, whose bound is the whole function's"}
"""Op.without of a function that rounds no intermediate result."""


@dataclass(frozen=True)
class Op:
    """One consumer of MXFP4 weights: everything the suites need to judge it."""

    name: str
    source: str
    """File name under kernels/."""
    axes: str
    """The shape alphabet of its cases, for example "M N K"."""
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case], Tensors]
    """Deterministic and device-independent; CPU tensors."""
    golden: Callable[[Case, Tensors], Mapping[str, Expected]]
    """One reference an output, from the inputs and, for a later stage, the kernel's own earlier outputs."""
    launch: Callable[[Device, Case, Tensors], Tensors]
    """Runs the production kernel on device tensors; the only part that knows grid, block and argument order."""
    tolerance: Tolerance
    fuzz: Callable[[], SearchStrategy[Case]]
    row_axis: str
    """Axis along which rows are independent: a batch must not change a row's bits."""
    row_inputs: tuple[str, ...]
    """Names of the inputs whose first dimension is that axis; it is the first dimension of every output."""
    predict: Callable[[Case, Tensors], Tensors] | None = None
    """The exact bits of every output that is one contraction, from the model of the tensor core and the tensors that
    golden gets; None where the operator has none."""
    composed: Callable[[Case, Tensors], Mapping[str, Expected]] | None = None
    """The whole function's references for its last outputs, from the inputs alone; None for a single stage."""
    places: Callable[[Case, Tensors], Mapping[str, Mapping[str, torch.Tensor]]] | None = None
    """What the place of an element means, by output and by name: "head", "expert", "K block" (pattern.Places), from
    the tensors that golden gets. None: its indices."""
    awaits: tuple[Case, ...] = ()
    """Those of `cases` that no baseline holds yet: the next blessing run takes them in, and then they leave here."""
    without: Mapping[Gate, str] = field(default_factory=dict, hash=False)
    """Of an operator that rounds, the gates under which no case of it can be judged, and why."""
    operands: Callable[[Case], Mapping[str, Operand]] | None = None
    """By output that is a contraction, the input to zero where a failure is sought along K; None: there is none."""

    def __str__(self) -> str:
        return self.name

    @property
    def family(self) -> str:
        """The stem that its kernels share."""
        return self.source.removesuffix(".cu")


@dataclass(frozen=True)
class Outcome:
    """The verdict on one output set of one case under one gate."""

    case: str
    """str(Case)."""
    op: str
    shape: tuple[int, ...]
    dtype: str
    regime: str
    device: str
    """Device class: "host" or "sm_90"."""
    gate: Gate
    passed: bool
    elements: int
    bad: int
    """Elements past the gate, NaN and Inf that should not be there included."""
    nan: int
    inf: int
    ratio: float
    """Largest error / bound; 0 where the gate is bitwise and holds, inf where a bitwise gate fails."""
    max_ulp: float
    """Largest distance to the correctly rounded reference, in units in the last place of the output dtype."""
    nmse: float
    """Sum of squared errors / sum of squared references."""
    digest: str
    """First 16 hex digits of the sha256 over every output's bytes; all NaN count as the same."""
    inputs: str
    """The same over the inputs: two outcomes with other inputs are not comparable."""
    message: str
    """What, where, how bad, what to paste; empty when passed."""
    ties: int = 0
    """Ids that are not the reference's own choice but permitted: their scores differ by less than their bounds."""
    refused: bool = False
    """Failed for no other reason than that the case proves nothing: a bound that is too wide, degenerate data."""
    line: float = 0.0
    """Largest error over what the probabilistic line allows, lambda sqrt(n) u magnitude and the output's rounding
    (bounds.py); above 1 it has drifted, which is recorded and no failure. 0 where the gate is bitwise."""
    chain: int = 0
    """Length n of the longest chain of roundings behind a bound."""
    high_ratio: float = 0.0
    """The 99.9th percentile of error / bound."""
    cosine: float = 1.0
    """Of the angle between output and reference, the smallest of all outputs. Blind to scale: for trends alone."""

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in decibels: what nmse says."""
        return -10 * math.log10(self.nmse) if self.nmse > 0 else math.inf

    @property
    def drifted(self) -> bool:
        """Within the bound, but past the probabilistic line."""
        return self.passed and self.line > 1
