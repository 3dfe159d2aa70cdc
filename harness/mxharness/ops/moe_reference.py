"""References of moe.py: each stage given the actual one before it, contractions to the bit, and the whole function.

ids are exact. composed is the formula from the inputs alone; a token whose choice of experts hangs on less than the
rounding error of its logits has no bound there (suites/meta/test_moe.py: no listed case has such a token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from mxharness import float32, functional, mxfp4, tensor_core
from mxharness import golden as reference
from mxharness.bounds import Bounded, contraction, exact, gamma, quantum, rounded
from mxharness.op import Case, Expected, Tensors
from mxharness.ops import activation_bits, activations, elementary_bits
from mxharness.ops.gemm import linear_bits, linear_dense, linear_dense_bits, weight_quantum


def chosen(case: Case) -> int:
    """K."""
    return int(case.option("k") or 4)


def activation(case: Case) -> tuple[float, float]:
    """Alpha and the limit."""
    return float(case.option("alpha") or 1.702), float(case.option("limit") or 7)


def _swiglu(case: Case) -> activations.Activation:
    alpha, limit = activation(case)
    return partial(activations.swiglu_limited, alpha=alpha, limit=limit)


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Each stage given the actual one before it."""
    x, k = tensors["x"], chosen(case)
    logits = linear_dense(x, tensors["router_weight"], tensors["router_bias"], torch.float32)
    stages = {"logits": logits, **routed(tensors["logits"], k)}
    if case.op == "moe_router":
        return stages
    stages["gate_up"] = _product(tensors, "gate_up", x.unsqueeze(1).expand(-1, k, -1), x.dtype)
    stages["h"] = activations.expected(_swiglu(case), x.dtype, *_branches(tensors["gate_up"]))
    stages["down"] = _product(tensors, "down", tensors["h"], torch.float32)
    stages["y"] = joined(tensors["weights"], tensors["down"], x.dtype)
    return stages


def routed(logits: torch.Tensor, k: int) -> dict[str, Expected]:
    """The ids (T, k) of the k largest logits (T, E), exact, and their weights (T, k)."""
    largest, ids = _largest_first(logits.double(), k)
    weights, condition = _softmax(largest)
    return {"ids": Expected(ids.to(torch.int32)), "weights": Expected(weights, condition, k + 4, torch.float32)}


def joined(weights: torch.Tensor, down: torch.Tensor, dtype: torch.dtype) -> Expected:
    """Y (T, H): down (T, k, H) by weights (T, k); the sum starts from 0: k roundings a term."""
    terms = weights.double().unsqueeze(-1) * down.double()
    return Expected(terms.sum(1), terms.abs().sum(1), weights.shape[1], dtype)


def _largest_first(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest and their ids; NaN before all numbers, equals in the order of their ids."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the last dimension of k logits, largest first, and what its k + 4 roundings are proportional to.

    A logit's distance d from the largest is rounded (|d| u in its exponential), the exponential is within a unit in the
    last place (2 u), for numerator and denominator each; k - 1 roundings add up the denominator.
    """
    weights = logits.softmax(-1)
    distance = (logits[:, :1] - logits).nan_to_num(0, 0)  # where it is infinite the weight is 0
    return weights, weights * (1 + distance + (weights * distance).sum(-1, keepdim=True))


def _branches(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, which are interleaved."""
    return gate_up[..., 0::2], gate_up[..., 1::2]


def _chain(K: int, dtype: torch.dtype) -> int:
    """Roundings of a contraction of length K: those of a chunk, and the sum of the chunks."""
    chunk = tensor_core.CHUNK[functional.ACTIVATIONS[dtype]]
    return min(chunk, K) + -(-K // chunk)


def _by_expert(
    tensors: Tensors, name: str, ids: torch.Tensor
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """For every expert among ids (T, k): where it stands there, and its codes, scales and bias."""
    parts = [tensors[f"{name}_{part}"] for part in ("codes", "scales", "bias")]
    for expert in sorted(set(ids.flatten().tolist())):
        if 0 <= expert < len(parts[0]):  # another id is an error of the stage ids
            yield ids == expert, tuple(part[expert] for part in parts)


def _product(tensors: Tensors, name: str, x: torch.Tensor, dtype: torch.dtype) -> Expected:
    """A row of x (T, k, K) times the weight of its actual expert, plus that expert's bias: (T, k, N)."""
    shape = (*x.shape[:2], tensors[f"{name}_bias"].shape[1])
    value = torch.full(shape, torch.nan, dtype=torch.float64, device=x.device)
    magnitude, step = value.clone(), value.clone()
    for here, (codes, scales, bias) in _by_expert(tensors, name, tensors["ids"]):
        rows, terms = reference.contraction(x[here], reference.decode(mxfp4.unpack(codes), scales))
        value[here], magnitude[here] = rows + bias, terms + bias.abs()
        of_products = quantum(x[here]).unsqueeze(-1) * weight_quantum(scales)
        step[here] = torch.minimum(of_products, quantum(bias.unsqueeze(-1)))
    return Expected(value, magnitude, _chain(x.shape[-1], x.dtype) + 1, dtype, quantum=step)


def predict(case: Case, tensors: Tensors) -> Tensors:
    """Every stage in bits but the ids, which are exact in golden: products of the actual experts."""
    x, ids = tensors["x"], tensors["ids"]
    logits = tensors["logits"].gather(1, ids.long().clamp(0, tensors["logits"].shape[1] - 1))
    found = {
        "logits": linear_dense_bits(x, tensors["router_weight"], tensors["router_bias"], torch.float32),
        "weights": _softmax_bits(logits),
    }
    if case.op == "moe_router":
        return found
    rows = x.unsqueeze(1).expand(-1, chosen(case), -1)
    found["gate_up"] = _product_bits(tensors, "gate_up", rows, x.dtype)
    found["down"] = _product_bits(tensors, "down", tensors["h"], torch.float32)
    alpha, limit = activation(case)
    function = partial(activation_bits.swiglu_limited, alpha=alpha, limit=limit)
    found["h"] = activation_bits.activated(function, x.dtype, *_branches(tensors["gate_up"]))
    total = torch.zeros_like(tensors["down"][:, 0])
    for slot in range(chosen(case)):
        total = total + tensors["weights"][:, slot, None] * tensors["down"][:, slot]
    found["y"] = total.to(x.dtype)
    return found


def _softmax_bits(logits: torch.Tensor) -> torch.Tensor:
    """Of k logits, the largest first: exponentials over their sum, added in this order from 0."""
    each = torch.from_numpy(elementary_bits.compute("exp", (logits - logits[:, :1]).numpy()))
    total = torch.zeros_like(each[:, 0])
    for slot in range(each.shape[1]):
        total = total + each[:, slot]
    return each / total[:, None]


def _product_bits(tensors: Tensors, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.full((*x.shape[:2], tensors[f"{name}_bias"].shape[1]), torch.nan, dtype=dtype)
    for here, (codes, scales, bias) in _by_expert(tensors, name, tensors["ids"]):
        y[here] = linear_bits(x[here], codes, scales, bias, dtype)
    return y


def composed(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """The formula from the inputs alone. A weight by slot depends on the logits' order only, not on whose they are."""
    x, w, k = inputs["x"], inputs["router_weight"], chosen(case)
    bias = inputs["router_bias"].double()
    logits = contraction(exact(x), w, _chain(x.shape[-1], x.dtype))
    logits = Bounded(logits.value + bias, logits.error + gamma(1) * (logits.value + bias).abs())
    off = logits.error.where(logits.value.isfinite(), 0).amax(-1, keepdim=True)  # of any logit of the token
    values, order = _largest_first(logits.value, case.shape[1])
    largest, ids = values[:, :k], order[:, :k]
    value, condition = _softmax(largest)
    weights = Bounded(value, value * torch.expm1(2 * off) + gamma(k + 4) * condition)
    if case.op == "moe_router":
        here, slot = logits.value.unsqueeze(1), largest.unsqueeze(2)
        same = (here == slot) | (here.isnan() & slot.isnan()) | ((here - slot).abs() <= 2 * off.unsqueeze(2))
        return {
            "ids": Expected(ids.to(torch.int32), permitted=same),
            "weights": Expected(value, torch.zeros_like(value), 0, torch.float32, slack=weights.error),
        }
    product = _bounded_product(inputs, "gate_up", exact(x.unsqueeze(1).expand(-1, k, -1)), ids, x.dtype)
    h = rounded(activations.carried(_swiglu(case), *_bounded_branches(rounded(product, x.dtype))), x.dtype)
    down = _bounded_product(inputs, "down", h, ids, x.dtype)
    terms = weights.value.unsqueeze(-1) * down.value
    spread = weights.error.unsqueeze(-1) * (down.value.abs() + down.error) + weights.value.unsqueeze(-1) * down.error
    error = spread.sum(1)
    if k < case.shape[1]:  # another choice of experts may be right: no bound holds for this token
        undecided = values[:, k - 1 : k] - values[:, k : k + 1] <= 2 * off
        error = torch.where(undecided, torch.inf, error)
    return {"y": Expected(terms.sum(1), terms.abs().sum(1), k, x.dtype, slack=error)}


def _bounded_product(inputs: Tensors, name: str, x: Bounded, ids: torch.Tensor, dtype: torch.dtype) -> Bounded:
    """As _product, from rows that are not exact; activations of `dtype`."""
    value = torch.empty((*ids.shape, inputs[f"{name}_bias"].shape[1]), dtype=torch.float64, device=ids.device)
    error = torch.empty_like(value)
    for here, (codes, scales, bias) in _by_expert(inputs, name, ids):
        found = _of_an_expert(Bounded(x.value[here], x.error[here]), codes, scales, bias, dtype)
        value[here], error[here] = found.value, found.error
    return Bounded(value, error)


def _of_an_expert(
    x: Bounded, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> Bounded:
    """Rows x (M, K) times one expert's weight (N, K), plus its bias; activations of `dtype`."""
    rows = contraction(x, reference.decode(mxfp4.unpack(codes), scales), _chain(x.value.shape[-1], dtype))
    value = rows.value + bias
    return Bounded(value, rows.error + gamma(1) * (value.abs() + rows.error))


def gated(function: activations.Activation, tensors: Tensors) -> Expected:
    """`function` of gate and up (M, I), which are x (M, H) times codes, plus bias, of one expert, kept in x's dtype."""
    dtype = tensors["x"].dtype
    product = _of_an_expert(exact(tensors["x"]), tensors["codes"], tensors["scales"], tensors["bias"], dtype)
    h = activations.carried(function, *_bounded_branches(rounded(product, dtype)))
    return Expected(h.value, torch.zeros_like(h.value), 0, dtype, slack=h.error)


def gated_bits(function: Callable[..., float32.Array], tensors: Tensors) -> torch.Tensor:
    """The same in bits."""
    dtype = tensors["x"].dtype
    product = linear_bits(tensors["x"], tensors["codes"], tensors["scales"], tensors["bias"], dtype)
    return activation_bits.activated(function, dtype, *_branches(product))


def _bounded_branches(gate_up: Bounded) -> tuple[Bounded, Bounded]:
    gate, up = (Bounded(*pair) for pair in zip(_branches(gate_up.value), _branches(gate_up.error), strict=True))
    return gate, up
