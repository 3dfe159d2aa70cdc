"""What a KV cache holds after an append, and rotation: references of ops/kv_cache.py and ops/attention.py."""

from __future__ import annotations

import torch

from mxharness import golden as reference
from mxharness import mxfp4
from mxharness.bounds import quantum
from mxharness.op import Case, Expected, Tensors


def rotate(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, order: str | None) -> Expected:
    """Rows x (B, T, H, D) rotated in x's own precision, and |terms|; chain 2: a product and the sum."""
    T = x.shape[1]
    place = positions.long()[:, None] + torch.arange(T, device=x.device)
    turn = table[place].to(x.dtype).unsqueeze(2)  # (B, T, 1, D/2, 2)
    cos, sin = turn[..., 0], turn[..., 1]
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if order == "interleaved" else (x[..., :half], x[..., half:])  # (.., D/2)

    def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        both = torch.stack((first, second), -2)
        return (both.mT if order == "interleaved" else both).flatten(-2)

    size = joined((a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs())
    return Expected(joined(a * cos - b * sin, b * cos + a * sin), size, chain=2)


def rotated_bits(case: Case, x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The rotation in float32, each operation rounded once, as the kernel declares it; x itself without a table."""
    if "angles" not in tensors:
        return x
    return rotate(x.float(), tensors["angles"], tensors["positions"], case.option("rope")).value.to(x.dtype)


def rotated(case: Case, x: torch.Tensor, tensors: Tensors) -> Expected:
    """The rotation's float64 reference."""
    found = rotate(x.double(), tensors["angles"].double(), tensors["positions"], case.option("rope"))
    step = quantum(x.flatten()) * quantum(tensors["angles"].flatten())
    return Expected(found.value, found.magnitude, found.chain, x.dtype, quantum=step.expand_as(found.value))


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of rows (.., D): floor rule, ties to even; a block with NaN or Inf is byte 255 with codes 0."""
    padded = torch.nn.functional.pad(rows.double(), (0, -rows.shape[-1] % 32))
    broken = ~padded.reshape(*padded.shape[:-1], -1, 32).isfinite().all(-1)
    whole = broken.repeat_interleave(32, -1)
    codes, scales = reference.quantize(torch.where(whole, 0.0, padded), "floor", "even")
    codes, scales = torch.where(whole, 0, codes), torch.where(broken, mxfp4.SCALE_NAN, scales)
    return reference.pack(codes.to(torch.uint8), scales, "linear")[0], scales.to(torch.uint8)


def placed(rows: torch.Tensor, positions: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The cache `before` (B, Hkv, S, ..) with rows (B, T, Hkv, ..) at positions[b] + t."""
    after = before.clone()
    place = positions.long()[:, None] + torch.arange(rows.shape[1], device=rows.device)
    after[torch.arange(len(after), device=after.device)[:, None], :, place] = rows
    return after


def appended(case: Case, tensors: Tensors, k: torch.Tensor, v: torch.Tensor, before: Tensors) -> dict[str, Expected]:
    """What the cache holds after k and v (B, T, Hkv, D) were appended to `before`."""
    starts, bits = tensors["positions"], rotated_bits(case, k, tensors)
    found = {}
    for name, rows in (("k_cache", bits), ("v_cache", v)):
        if case.option("cache") == "mxfp4":
            codes, scales = quantized(rows)
            found[name] = Expected(placed(codes, starts, before[name]))
            found[f"{name}_scales"] = Expected(placed(scales, starts, before[f"{name}_scales"]))
        elif name == "v_cache" or "angles" not in tensors:
            found[name] = Expected(placed(rows, starts, before[name]))
        else:
            want, old = rotated(case, k, tensors), before[name].double()
            size = torch.zeros_like(want.value) if want.magnitude is None else want.magnitude
            step = None if want.quantum is None else placed(want.quantum, starts, torch.ones_like(old))
            found[name] = Expected(
                placed(want.value, starts, old), placed(size, starts, old * 0), want.chain, rows.dtype, quantum=step
            )
    return found


def gathered(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, columns page, ..) of pages (P, Hkv, page, ..) and a table (B, columns)."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3)
