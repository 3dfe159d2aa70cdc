"""A whole model to MXFP4: every linear layer and embedding replaced in place, tied weights still tied."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from mxharness.errors import UserError
from mxharness.functional import ACTIVATIONS
from mxharness.mxfp4 import Quantized
from mxharness.nn.embedding import MXFP4Embedding
from mxharness.nn.linear import MXFP4Linear
from mxharness.nn.packed import DTYPES, PackedModule, pack
from mxharness.sqnr import decibels, energies

_ROWS = 4096
"""Of a weight that are decoded at a time to measure its error."""


@dataclass(frozen=True)
class Replaced:
    """A module that now holds MXFP4."""

    name: str
    kind: str
    """What it was: Linear, Conv1D or Embedding."""
    shape: tuple[int, int]
    """(N, K) of the weight."""
    before: int
    """Bytes of its weight before."""
    after: int
    """Bytes of codes and scales."""
    sqnr: float
    """Decoded against original weight, in dB; inf where no value changed, NaN for a weight of zeros or without data."""
    tied_to: str | None
    """The first module that holds the same buffers, whose bytes count once."""


@dataclass(frozen=True)
class Left:
    """A matrix, or more dimensions, that stays as it was."""

    name: str
    """Of the parameter."""
    shape: tuple[int, ...]
    nbytes: int
    why: str


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    before: int
    """Bytes of all parameters and buffers of the model, tied ones once."""
    after: int

    def __str__(self) -> str:
        size = f"{self.before:,} bytes became {self.after:,} ({self.before / self.after:.2f}x less)"
        worst = min((one for one in self.replaced if not math.isnan(one.sqnr)), key=lambda one: one.sqnr, default=None)
        error = "" if worst is None else f"; lowest SQNR {worst.sqnr:.1f} dB in {worst.name}"
        lines = [f"{len(self.replaced)} modules hold MXFP4: {size}{error}"]
        lines += [f"  left as it was: {one.name} {one.shape}, {one.nbytes:,} bytes: {one.why}" for one in self.left]
        return "\n".join(lines)


def quantize_model(
    model: torch.nn.Module,
    *,
    skip: str | Iterable[str] = (),
    compute_dtype: torch.dtype = torch.bfloat16,
    scale_rule: str = "floor",
    tie_rule: str = "even",
) -> QuantizationReport:
    """Replace, in place, every `nn.Linear`, `nn.Embedding` and transformers `Conv1D` by a module that holds MXFP4.

    skip: names to leave alone, with * and ?; "lm_head" also fits "model.lm_head", and "layers.0" everything in it.
    A weight that several modules share (tied embedding and LM head) stays one; where one of them is left, all are.
    Subclasses with a forward of their own and modules with hooks are left, and so are parameters outside such modules
    (gpt-oss' experts, routers): the report says which. compute_dtype and the rules are those of `MXFP4Linear`. The
    model is put in eval mode and wants no gradients any more.

    To load a saved `state_dict`, build the same model, call this with the same skip, then load. save_pretrained works
    too, and safetensors.torch.load_model reads its file; from_pretrained does not know these modules.

    Raises UserError, before anything is changed, for a model that holds MXFP4 already, has nothing to replace or
    is itself a layer, for skip patterns that fit nothing, and for weights that hold NaN or Inf.
    """
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"quantize_model takes a torch.nn.Module, not {type(model).__name__}")
    patterns = (skip,) if isinstance(skip, str) else tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"skip takes names of modules, with * and ?, not {skip!r}")
    groups, left = _plan(model, patterns)
    _check(model, groups, compute_dtype)
    before = _nbytes(model)
    replaced: list[Replaced] = []
    for names in groups:
        replaced += _replace(model, names, compute_dtype, scale_rule, tie_rule)
    _tell_transformers(model)
    model.requires_grad_(requires_grad=False)
    model.eval()
    return QuantizationReport(tuple(replaced), left, before, _nbytes(model))


def _kind(module: torch.nn.Module) -> str | None:
    """What is to be replaced, by exact type: a subclass may compute something else."""
    if type(module) is torch.nn.Linear:
        return "Linear"
    if type(module) is torch.nn.Embedding:
        return "Embedding"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "Conv1D"
    return None


def _obstacle(name: str, module: torch.nn.Module, patterns: tuple[str, ...]) -> str | None:
    """Why a module's own parameters cannot be replaced; None where they can."""
    if fitting := [pattern for pattern in patterns if _fits(name, pattern)]:
        return f"skipped by '{fitting[0]}'"
    if _kind(module) is None:
        return f"{type(module).__name__} is no nn.Linear, nn.Embedding or Conv1D"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "the module has hooks or a forward of its own"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the table as it is read"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.dtype not in DTYPES or 0 in weight.shape:
        return "the weight is empty or of a dtype that cannot be quantised"
    return None


def _fits(name: str, pattern: str) -> bool:
    """Whether the pattern fits the name, or consecutive parts of it."""
    parts = name.split(".")
    pieces = pattern.count(".") + 1
    return any(fnmatchcase(".".join(parts[i : i + pieces]), pattern) for i in range(len(parts) - pieces + 1))


def _identity(weight: torch.Tensor) -> tuple[object, ...]:
    """What two tied weights have in common, be they one parameter or two over the same memory."""
    return (id(weight),) if weight.is_meta else (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)


def _plan(model: torch.nn.Module, patterns: tuple[str, ...]) -> tuple[list[list[str]], tuple[Left, ...]]:
    """Names of the modules to replace, those with one weight together, and every matrix that is not replaced."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(module, PackedModule) for module in modules.values()):
        raise UserError("this model holds MXFP4 modules already; quantising a weight twice would only add error")
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in modules):
            some = [name for name, module in modules.items() if _kind(module)][:8]
            raise UserError(f"no module fits the skip pattern '{pattern}'; some are {', '.join(some)}")
    holders: dict[tuple[object, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                holders[_identity(parameter)].append((name, parameter_name))
    groups, left = [], []
    for group in holders.values():
        obstacles = {name: _obstacle(name, modules[name], patterns) for name, _ in group}
        kinds = {_kind(modules[name]) for name, _ in group}
        blocked = next((name for name, why in obstacles.items() if why), None)
        if blocked is None and not ("Conv1D" in kinds and len(kinds) > 1):
            groups.append([name for name, _ in group])
            continue
        for name, parameter_name in group:
            parameter = getattr(modules[name], parameter_name)
            why = obstacles[name] or (
                f"tied to {blocked}, which is left" if blocked else "tied to a module that holds it transposed"
            )
            dotted = f"{name}.{parameter_name}" if name else parameter_name
            left.append(Left(dotted, tuple(parameter.shape), parameter.nbytes, why))
    return groups, tuple(left)


def _check(model: torch.nn.Module, groups: list[list[str]], compute_dtype: torch.dtype) -> None:
    """Everything that could go wrong halfway through; rules that do not exist do before the first replacement."""
    if groups == [[""]]:
        raise UserError("this model is itself one layer; use MXFP4Linear.from_linear or MXFP4Embedding.from_embedding")
    if not groups:
        raise UserError("this model has no nn.Linear, nn.Embedding or Conv1D to replace")
    if compute_dtype not in ACTIVATIONS:
        raise UserError(f"compute_dtype must be torch.bfloat16 or torch.float16, not {compute_dtype}")
    for names in groups:
        weight = model.get_submodule(names[0]).weight
        if isinstance(weight, torch.Tensor) and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise UserError(f"{names[0]}.weight holds NaN or Inf, which MXFP4 does not; repair it or skip the module")


def _replace(
    model: torch.nn.Module, names: list[str], compute_dtype: torch.dtype, scale_rule: str, tie_rule: str
) -> list[Replaced]:
    """Put modules that share one packed weight in the place of modules that share one weight."""
    shared: Quantized | None = None
    made: dict[torch.nn.Module, PackedModule] = {}
    records = []
    for name in names:
        old = model.get_submodule(name)
        kind, weight = _kind(old), old.weight
        assert isinstance(weight, torch.Tensor)  # noqa: S101  _obstacle looked
        rows = weight.detach().T if kind == "Conv1D" else weight.detach()
        if shared is None:
            shared = pack(rows, scale_rule, tie_rule)
            sqnr = _sqnr(rows, shared)
        if old not in made:
            made[old] = _packed(old, shared, rows, compute_dtype)
        model.set_submodule(name, made[old])
        records.append(
            Replaced(
                name=name,
                kind=kind or "",
                shape=(rows.shape[0], rows.shape[1]),
                before=weight.nbytes,
                after=shared.codes.nbytes + shared.scales.nbytes,
                sqnr=sqnr,
                tied_to=None if name == names[0] else names[0],
            )
        )
    return records


def _packed(old: torch.nn.Module, weight: Quantized, rows: torch.Tensor, compute_dtype: torch.dtype) -> PackedModule:
    """The module for the place of `old`, whose weight was rows (N, K)."""
    if isinstance(old, torch.nn.Embedding):
        return MXFP4Embedding.from_quantized(
            weight, embedding_dim=rows.shape[1], padding_idx=old.padding_idx, dtype=rows.dtype
        )
    return MXFP4Linear.from_quantized(
        weight, getattr(old, "bias", None), in_features=rows.shape[1], dtype=rows.dtype, compute_dtype=compute_dtype
    )


def _tell_transformers(model: torch.nn.Module) -> None:
    """Name the buffers that tied modules share where save_pretrained and tie_weights look for tied parameters."""
    for module in model.modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if not isinstance(keys, dict):
            continue
        packed = {name for name, child in module.named_modules() if isinstance(child, PackedModule)}
        told: dict[str, str] = {}
        for target, source in keys.items():
            parts = ("codes", "scales") if target.removesuffix(".weight") in packed else ("weight",)
            told |= {target.removesuffix("weight") + part: source.removesuffix("weight") + part for part in parts}
        setattr(module, "_tied_weights_keys", told)  # noqa: B010  torch types unknown attributes as modules


def _sqnr(weight: torch.Tensor, quantized: Quantized) -> float:
    """Of a weight (N, K), in dB; NaN for one without data."""
    if weight.is_meta:
        return math.nan
    pieces = zip(*(torch.split(tensor, _ROWS) for tensor in (weight, *quantized)), strict=True)
    sums = [energies(rows, Quantized(codes, scales)) for rows, codes, scales in pieces]
    return decibels(sum(signal for signal, _ in sums), sum(noise for _, noise in sums))


def _nbytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, memory that several share counted once."""
    sizes = {_identity(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(sizes.values())
