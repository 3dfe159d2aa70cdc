"""The elementary functions of math.cuh against mpmath: within the error that is stated for each, and right at the ends.

The stated errors were measured over all 2^32 inputs; here every binade, every branch and the worst inputs are visited.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from mxharness import paths
from mxharness.op import Case
from mxharness.ops import elementary, elementary_bits

EXACT = {
    "exp": mpmath.exp,
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
}


@pytest.fixture
def compute(device):
    """f(x) by the kernel, for a float32 array."""

    def run(name: str, x: np.ndarray) -> np.ndarray:
        case = Case("elementary", (1, x.size), "bits", "fp32", options=(f"fn={name}",))
        on_device = device.upload(torch.from_numpy(x))
        y = elementary.launch(device, case, {"x": on_device})["y"]
        device.synchronize()
        return y.cpu().numpy()

    return run


def sample(name: str) -> np.ndarray:
    """Three numbers of every binade and sign, neighbours of every edge, the interval where most happens."""
    rng = np.random.default_rng(0)
    every = (np.arange(255, dtype=np.uint32)[:, None] << 23) | rng.integers(0, 2**23, (255, 3), dtype=np.uint32)
    edges = np.array([*elementary.EDGES[1:-1], *map(abs, elementary.WORST[name])], dtype=np.float32).view(np.uint32)
    near = edges[:, None] + np.arange(-3, 4, dtype=np.int64)
    positive = np.concatenate((every.ravel(), near.ravel().astype(np.uint32))).view(np.float32)
    dense = rng.uniform(-12, 12, 500).astype(np.float32)
    whole = np.concatenate((positive, -positive, dense))
    return whole[np.isfinite(whole)]


def ulps(got: float, exact: mpmath.mpf) -> float:
    """The distance in units in the last place of the exact value, 2^-149 or more."""
    exponent = max(int(mpmath.floor(mpmath.log(abs(exact), 2))), -126) if exact else -126
    return float(abs(mpmath.mpf(got) - exact) * mpmath.mpf(2) ** (23 - exponent))


@pytest.mark.parametrize("name", elementary.FUNCTIONS)
def test_errors_are_as_stated(name, compute):
    x = sample(name)
    if name == "rsqrt":
        x = x[x > 0]
    y = compute(name, x)
    largest = mpmath.mpf(float(np.finfo(np.float32).max)) * (1 + mpmath.mpf(2) ** -25)
    compared = 0
    with mpmath.workdps(30):
        for at, got in zip(x.tolist(), y.tolist(), strict=True):
            exact = EXACT[name](mpmath.mpf(at)) if at > -800 or not name.startswith("exp") else mpmath.mpf(0)
            if abs(exact) >= largest:
                assert got == np.inf, f"{name}({at!r})"
            else:
                limit = elementary.ULP[name] + (elementary.SUBNORMAL_ULP if abs(exact) < 2.0**-126 else 0)
                assert ulps(got, exact) <= limit, f"{name}({at!r}) = {got!r}, should be {exact}"
                compared += 1
    assert compared > 700


def test_ends(compute):
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, inf, -inf, nan], dtype=np.float32)
    ends = {
        "exp": (1.0, 1.0, inf, 0.0, nan),
        "exp2": (1.0, 1.0, inf, 0.0, nan),
        "sigmoid": (0.5, 0.5, 1.0, 0.0, nan),
        "tanh": (0.0, -0.0, 1.0, -1.0, nan),
        "erf": (0.0, -0.0, 1.0, -1.0, nan),
        "rsqrt": (inf, -inf, 0.0, nan, nan),
    }
    for name, want in ends.items():
        got = compute(name, x)
        assert str(got.tolist()) == str(list(want)), name  # -0.0 and nan have names of their own


@pytest.mark.parametrize("name", ["exp", "exp2", "sigmoid", "tanh", "erf"])
def test_monotone_where_branches_meet(name, compute):
    edges = np.array([edge for edge in elementary.EDGES if 0 < edge < np.inf], dtype=np.float32).view(np.int32)
    neighbours = (edges[:, None] + np.arange(-200, 201, dtype=np.int32)).clip(0).view(np.float32)
    for x in (neighbours, -neighbours[:, ::-1]):
        y = compute(name, np.ascontiguousarray(x).ravel()).reshape(x.shape)
        assert (y[:, 1:] >= y[:, :-1]).all()


def test_the_header_states_the_same_errors():
    text = (paths.kernels() / "math.cuh").read_text()
    stated = re.findall(r"// .*Error ([0-9.]+) ulp.*\n(?://.*\n)*__device__ inline float (\w+?)_?32", text)
    assert {name: float(error) for error, name in stated} == elementary.ULP


# The bits of an H100


def of_the_h100() -> dict[str, list[str]]:
    """For each function a checksum of its results on each of the 256 ranges of 2^24 consecutive bit patterns."""
    text = json.loads((Path(__file__).parent / "elementary_h100.json").read_text())
    return {name: "".join(lines).split() for name, lines in text["slices"].items()}


def checksum(y: torch.Tensor) -> str:
    """Of float32 results in order; every NaN counts as the same."""
    bits = torch.where(y.isnan(), torch.full_like(y, torch.nan), y).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, 65_522, device=y.device).repeat(-(-y.numel() // 65_521))[: y.numel()]
    return hashlib.sha256(f"{int(bits.sum())} {int((bits * weights).sum())}".encode()).hexdigest()[:8]


@pytest.mark.parametrize("name", EXACT)
def test_results_are_an_h100s_bit_for_bit(name, device):
    """Every input there is on a GPU; on the CPU numbers from 0.5 to 4 of both signs, where most happens."""
    blessed = of_the_h100()[name]
    assert len(blessed) == 256
    whole = device.name == "cuda"
    for place in range(256) if whole else (0x3F, 0x40, 0xBF):
        patterns = np.arange(1 << 24, dtype=np.uint32) + np.uint32(place << 24)
        x = device.upload(torch.from_numpy(patterns.view(np.float32)))
        case = Case("elementary", (1, x.numel()), "bits", "fp32", options=(f"fn={name}",))
        y = elementary.launch(device, case, {"x": x})["y"]
        device.synchronize()
        assert checksum(y) == blessed[place], f"{name} of the bit patterns from {place:#04x}000000 on"


def test_the_prediction_of_e_to_the_x_is_an_h100s_bit_for_bit():
    """Numbers from -0.5 to -2, where most of a softmax's weights are; no kernel runs."""
    patterns = np.arange(0xBF << 24, 0xC0 << 24, dtype=np.uint32).view(np.float32)
    y = np.concatenate([elementary_bits.compute("exp", part) for part in np.split(patterns, 64)])
    assert checksum(torch.from_numpy(y)) == of_the_h100()["exp"][0xBF]
