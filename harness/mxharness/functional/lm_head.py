"""LM head: logits of an MXFP4 vocabulary matrix, and what is chosen by them; every choice is reproducible.

logits (M, V) = x W^T, x (M, K) bf16 or fp16, W: codes (V, K/2), scales (V, K/32) uint8, which may be the very table
that `embedding_lookup` reads (tied embedding). Temperature first, then top-k, then top-p on what top-k left, then
the sample. Tokens are ordered by logit, at equal logits the lower id comes first, so that a filter keeps one certain
set. A row's result does not depend on the batch, and no sum of floats on any order: masses of tokens are integers of
2^-40 of the largest (kernels/lm_head.cu).

A row that holds NaN comes out as NaN throughout, its id as -1, which `embedding_lookup` refuses; so does a row whose
largest logit is infinite wherever probabilities count (top-p, probabilities, sample).

Every function raises UserError, before anything is launched, for shapes, dtypes or alignment that `gemm` does not take
and for more than 2^22 tokens. Source: the user's LM head kernels; top-p after Holtzman et al., arXiv 1904.09751.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import (
    check_activations,
    check_tensor,
    check_vector,
    check_weight,
    device_of,
    integer,
    number,
    single,
)
from mxharness.functional.gemm import gemm
from mxharness.mxfp4 import Quantized

MOST_TOKENS = 1 << 22
"""So that the masses of a row, at most 2^40 each, stay below 2^63."""
_WARP_TOKENS = 1024
"""Up to so many tokens a row is one warp's work."""
_THREADS = 512
"""The most of a block that has a longer row to itself."""
_CANDIDATES = 1024
"""Tokens, or groups of tokens, that one block chooses from."""
_FEW = 512
"""Up to so many tokens are chosen from groups: two parts of each at least are candidates then."""
_TILE = 32
"""Groups of a tile."""
_SHARE = 16
"""Tokens of a group that one thread reads."""
_SOURCE = "lm_head.cu"


def lm_head_forward(x: torch.Tensor, weight: Quantized, *, device: Device | None = None) -> torch.Tensor:
    """Logits (M, V) float32 = x W^T, in the order of sums of `gemm`, with its bits."""
    return logit_stages(x, weight, device=device)["logits"]


def lm_head_forward_temperature(
    x: torch.Tensor, weight: Quantized, temperature: float, *, device: Device | None = None
) -> torch.Tensor:
    """Logits / temperature (M, V) float32, a correctly rounded quotient; temperature > 0, taken as float32."""
    return last_of(logit_stages(x, weight, temperature=temperature, device=device))


def lm_head_forward_topk(
    x: torch.Tensor, weight: Quantized, k: int, *, temperature: float = 1.0, device: Device | None = None
) -> torch.Tensor:
    """Logits / temperature (M, V) with the k largest kept and all others -Inf.

    Exactly k are kept: of equal logits at the threshold those with the lowest ids. UserError unless 1 <= k <= V.
    """
    if integer(k, "k") == 0:
        raise UserError("k is 0; top-k keeps 1 token or more")
    return last_of(logit_stages(x, weight, temperature=temperature, top_k=k, device=device))


def lm_head_forward_topp(
    x: torch.Tensor, weight: Quantized, p: float, *, temperature: float = 1.0, device: Device | None = None
) -> torch.Tensor:
    """Logits / temperature (M, V) with the nucleus kept and all others -Inf.

    The nucleus is the shortest beginning of the order of tokens whose probabilities reach p, never empty; for p = 1 it
    is every token. p counts in units of 2^-32. UserError unless 0 < p <= 1.
    """
    return last_of(logit_stages(x, weight, temperature=temperature, top_p=p, device=device))


def lm_head_greedy(x: torch.Tensor, weight: Quantized, *, device: Device | None = None) -> torch.Tensor:
    """Ids (M) int64 of the largest logits, of equal ones the lowest; -1 for a row that holds NaN."""
    return greedy_stages(x, weight, device=device)["ids"]


def lm_head_probabilities(
    x: torch.Tensor, weight: Quantized, *, temperature: float = 1.0, device: Device | None = None
) -> torch.Tensor:
    """P (M, V) float32 = softmax(logits / temperature)."""
    return probability_stages(x, weight, temperature=temperature, device=device)["p"]


def lm_head_sample(
    x: torch.Tensor,
    weight: Quantized,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Ids (M) int64, drawn by the caller's uniforms (M) float32 in [0, 1): the same uniforms, the same ids.

    Temperature, then top_k (0: no filter), then top_p on the renormalised rest, then the inverse of the distribution
    function in ascending order of the kept ids: the first id whose cumulated probability passes the uniform, which
    counts in units of 2^-32. Temperature 0 is `lm_head_greedy`. Also raises UserError for uniforms outside [0, 1);
    looking at them waits for a GPU, and validate=False leaves it out (graph capture): the id is then -1.
    """
    stages = sample_stages(
        x, weight, uniforms, temperature=temperature, top_k=top_k, top_p=top_p, validate=validate, device=device
    )
    return stages["ids"]


# Every step of a function, in order, by name: what is judged is what runs.


def logit_stages(
    x: torch.Tensor,
    weight: Quantized,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    device: Device | None = None,
) -> dict[str, torch.Tensor]:
    """Logits, then each as far as it is asked for: scaled; top_k_last and top_k; top_p_last and top_p.

    The first is x W^T, `scaled` that over the temperature, the others (M, V) are filtered; `last` (M) int64 is the
    last token that a filter kept.
    """
    device = device_of(x, device, "x")
    top_k, top_p = integer(top_k, "k"), number(top_p, "p")
    _check(device, x, weight, top_k, top_p)
    divisor = single(temperature, "temperature")
    if not 0 < divisor < math.inf:
        raise UserError(f"temperature must be a positive float32 number, not {temperature}")
    y = gemm(x, weight, out_dtype=torch.float32, device=device)
    stages = {"logits": y}
    if divisor != 1:
        z, y = y, device.empty(tuple(y.shape), torch.float32)
        grid = (-(-y.numel() // 1024),)
        device.launch(_SOURCE, "lm_head_temperature", grid, (256,), y, z, divisor, np.int64(y.numel()))
        stages["scaled"] = y
    if top_k:
        stages |= _filtered(device, "top_k", y, top_k)
        y = stages["top_k"]
    if top_p < 1:
        share = min(max(round(top_p * 2.0**32), 1), 2**32 - 1)
        stages |= _filtered(device, "top_p", y, np.int64(share))
    return stages


def greedy_stages(x: torch.Tensor, weight: Quantized, *, device: Device | None = None) -> dict[str, torch.Tensor]:
    """Logits and ids."""
    device = device_of(x, device, "x")
    stages = logit_stages(x, weight, device=device)
    z = stages["logits"]
    stages["ids"] = device.empty((len(z),), torch.int64)
    V = z.shape[1]
    firsts, _, count = _candidates(device, z)
    block = (-(-count // 32) * 32,)
    device.launch(_SOURCE, "lm_head_greedy", (len(z),), block, stages["ids"], z, firsts, V, count)
    return stages


def probability_stages(
    x: torch.Tensor, weight: Quantized, *, temperature: float = 1.0, device: Device | None = None
) -> dict[str, torch.Tensor]:
    """As `logit_stages`, and p."""
    device = device_of(x, device, "x")
    stages = logit_stages(x, weight, temperature=temperature, device=device)
    z = last_of(stages)
    stages["p"] = device.empty(tuple(z.shape), torch.float32)
    device.launch(_SOURCE, "lm_head_probabilities", (len(z),), _block(z), stages["p"], z, z.shape[1])
    return stages


def sample_stages(
    x: torch.Tensor,
    weight: Quantized,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    validate: bool = True,
    device: Device | None = None,
) -> dict[str, torch.Tensor]:
    """As `logit_stages`, and ids."""
    device = device_of(x, device, "x")
    top_k, top_p = integer(top_k, "k"), number(top_p, "p")
    _check(device, x, weight, top_k, top_p)
    check_tensor(uniforms, "uniforms")
    check_vector(device, uniforms, (len(x),), torch.float32, "uniforms")
    outside = ~((uniforms >= 0) & (uniforms < 1)) if validate else None
    if outside is not None and bool(outside.any()):
        at = int(outside.int().argmax())
        raise UserError(f"uniforms[{at}] is {float(uniforms[at])}; a uniform lies in [0, 1)")
    if number(temperature, "temperature") == 0:
        return greedy_stages(x, weight, device=device)
    stages = logit_stages(x, weight, temperature=temperature, top_k=top_k, top_p=top_p, device=device)
    z = last_of(stages)
    stages["ids"] = device.empty((len(z),), torch.int64)
    device.launch(_SOURCE, "lm_head_sample", (len(z),), _block(z), stages["ids"], z, uniforms, z.shape[1])
    return stages


def last_of(stages: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits that the last of the steps left."""
    return next(stages[name] for name in ("top_p", "top_k", "scaled", "logits") if name in stages)


def _check(device: Device, x: torch.Tensor, weight: Quantized, top_k: int, top_p: float) -> None:
    V, K = check_weight(device, weight)
    check_activations(device, x, K)
    if V > MOST_TOKENS:
        raise UserError(f"the vocabulary has {V} tokens; an LM head takes {MOST_TOKENS} at most")
    if not 0 <= top_k <= V:
        raise UserError(f"top-k keeps 1 to {V} tokens of a vocabulary of {V}, not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p keeps a share of 0 < p <= 1, not {top_p}")


def _filtered(device: Device, name: str, z: torch.Tensor, limit: int | np.int64) -> dict[str, torch.Tensor]:
    y, last = device.empty(tuple(z.shape), torch.float32), device.empty((len(z),), torch.int64)
    V, k = z.shape[1], int(limit)
    if name == "top_k" and (k <= _FEW or V <= _CANDIDATES):
        firsts, size, count = _candidates(device, z, y)
        most = max(count, 2 * k if size > 1 else 0)
        block = (max(32, 1 << (most - 1).bit_length()),)
        device.launch(_SOURCE, "lm_head_first", (len(z),), block, y, last, z, firsts, V, size, count, k)
        return {f"{name}_last": last, name: y}
    kernel = f"lm_head_{name.replace('_', '')}"
    device.launch(_SOURCE, kernel, (len(z),), _block(z), y, last, z, z.shape[1], limit)
    return {f"{name}_last": last, name: y}


def _candidates(device: Device, z: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor | None, int, int]:
    """What one block can choose from: ranks (M, count) of the first tokens of groups, the groups' size, and count.

    No more than _CANDIDATES groups; y becomes -Inf. A row of so few tokens is left as it is, in groups of 1.
    """
    M, V = z.shape
    if V <= _CANDIDATES:
        return None, 1, V
    size = max(4, 1 << (-(-V // _CANDIDATES) - 1).bit_length())
    tiles = -(-V // (_TILE * size))
    firsts = device.empty((M, tiles * _TILE), torch.int64)
    block = (32 * min(max(size // _SHARE, 1), _THREADS // 32),)
    device.launch(_SOURCE, "lm_head_groups", (M, tiles), block, firsts, y, z, V, size)
    return firsts, size, tiles * _TILE


def _block(z: torch.Tensor) -> tuple[int]:
    return (32 if z.shape[1] <= _WARP_TOKENS else _THREADS,)
