"""Cases of the LM head, and what they are fed."""

from __future__ import annotations

import torch

from mxharness import regimes
from mxharness.op import Case, Tensors

REGIMES = ("normal", "wide", "outliers")
SPECIALS = ("nan", "infinite")
DATA = ("data=equal", "data=repeated", "data=spike")
"""All rows of W the same; every row three times; one row 2^8 times larger. Others: "hill", all the same but one that is
4 times larger, which leaves a long flat tail; "tiny", logits that a large temperature makes zeros of both signs;
"close", logits of +-1 that differ in their last two bits, or are all the same odd multiple of the last."""


def _cases(name: str, shapes: tuple[tuple[int, int, int], ...], *options: tuple[str, ...]) -> tuple[Case, ...]:
    """Every shape with every option and both dtypes in turn, and each special distribution once."""
    product = [(shape, option) for shape in shapes for option in options]
    dtypes = ("bf16", "fp16") * len(product)
    drawn = [Case(name, shape, dtype=dtype, options=o) for (shape, o), dtype in zip(product, dtypes, strict=False)]
    special = [Case(name, (3, 33, 64), regime=regime, options=options[0]) for regime in SPECIALS]
    special += [Case(name, (5, 130, 96), "integers", dtype, options=options[0]) for dtype in ("bf16", "fp16")]
    return (*drawn, *special, Case(name, (2048, 5, 32), options=options[-1]))


FORWARD = (
    *(
        Case("lm_head_forward", shape, regime=regime, dtype=dtype)
        for shape in ((3, 33, 96), (9, 130, 160))
        for regime in ("normal", "integers", "wide")
        for dtype in ("bf16", "fp16")
    ),
    *(Case("lm_head_forward", shape) for shape in ((3, 1, 32), (2, 2, 64), (1, 4099, 32), (2048, 5, 32))),
    *(Case("lm_head_forward", (5, 37, 64), dtype=dtype, options=("tied",)) for dtype in ("bf16", "fp16")),
)
TEMPERATURE = _cases(
    "lm_head_forward_temperature", ((3, 1, 32), (2, 33, 64), (5, 1000, 32)), ("t=0.7",), ("t=3",), ("t=1",)
)
TOP_K = (
    *_cases("lm_head_forward_topk", ((3, 33, 64),), ("k=1",), ("k=5", "t=0.7"), ("k=33",), ("k=2",)),
    *(
        Case("lm_head_forward_topk", (3, 1000, 32), dtype=dtype, options=(data, k))
        for data, k, dtype in zip(DATA, ("k=999", "k=40", "k=40"), ("bf16", "fp16", "bf16"), strict=True)
    ),
    Case("lm_head_forward_topk", (3, 1, 32), options=("k=1",)),
    Case("lm_head_forward_topk", (3, 33, 32), options=("data=tiny", "k=5", "t=1e15")),
    Case("lm_head_forward_topk", (3, 33, 32), options=("data=close", "k=5")),
    Case("lm_head_forward_topk", (4, 4099, 32), regime="wide", options=("k=1000",)),
    Case("lm_head_forward_topk", (2, 4099, 32), options=("data=equal", "k=4098")),
    Case("lm_head_forward_topk", (2, 20000, 32), options=("k=50",)),  # in vectors, by many blocks
    Case("lm_head_forward_topk", (2, 20000, 32), dtype="fp16", options=("data=repeated", "k=512")),
)
TOP_P = (
    *_cases("lm_head_forward_topp", ((3, 33, 64),), ("p=0.9",), ("p=1e-10",), ("p=1", "t=2"), ("p=0.5", "t=0.1")),
    *(
        Case("lm_head_forward_topp", (3, 1000, 32), dtype=dtype, options=(data, "p=0.5"))
        for data, dtype in zip(DATA, ("bf16", "fp16", "bf16"), strict=True)
    ),
    Case("lm_head_forward_topp", (3, 1, 32), options=("p=0.9",)),
    Case("lm_head_forward_topp", (3, 1000, 32), options=("data=equal", "p=0.5000000005")),  # 501 tokens, not 500
    Case("lm_head_forward_topp", (3, 32, 32), options=("data=close", "p=0.5")),  # of 32 equal tokens 16, not 17
    Case("lm_head_forward_topp", (6, 4099, 32), seed=3, options=("data=hill", "p=0.9", "t=0.05")),
    Case("lm_head_forward_topp", (4, 4099, 32), options=("p=0.9", "t=0.2")),
    Case("lm_head_forward_topp", (2, 4099, 32), options=("data=equal", "p=0.999999")),
)
GREEDY = (
    *_cases("lm_head_greedy", ((3, 1, 32), (2, 2, 32), (3, 33, 64), (5, 1000, 32)), ()),
    *(Case("lm_head_greedy", (3, 1000, 32), options=(data,)) for data in DATA),
    Case("lm_head_greedy", (3, 33, 32), options=("data=close",)),
    Case("lm_head_greedy", (4, 4099, 32), options=("data=repeated",)),
    Case("lm_head_greedy", (2, 20000, 32)),
)
PROBABILITIES = (
    *_cases("lm_head_probabilities", ((3, 1, 32), (3, 33, 64), (5, 1000, 32)), (), ("t=0.1",)),
    *(Case("lm_head_probabilities", (3, 1000, 32), options=(data,)) for data in DATA),
    Case("lm_head_probabilities", (9, 1000, 32), options=("data=hill", "t=0.08")),
    Case("lm_head_probabilities", (4, 4099, 32), options=("t=0.3",)),
)
SAMPLE = (
    *_cases(
        "lm_head_sample",
        ((4, 33, 64), (5, 1000, 32)),
        (),
        ("k=7", "p=0.8"),
        ("t=0",),
        ("k=3", "t=0.5"),
        ("p=0.6", "t=0.2"),
    ),
    *(Case("lm_head_sample", (9, 1000, 32), options=(data, "k=50", "p=0.5")) for data in DATA),
    *(Case("lm_head_sample", (9, 1000, 32), options=(data,)) for data in DATA),
    Case("lm_head_sample", (3, 1, 32)),
    Case("lm_head_sample", (6, 33, 64), options=("outside",)),
    Case("lm_head_sample", (6, 4099, 32), seed=3, options=("data=hill", "t=0.05")),
    Case("lm_head_sample", (6, 4099, 32), options=("t=0.3",)),
    Case("lm_head_sample", (4, 4099, 32), options=("k=500", "p=0.95", "t=0.2")),
)


def make_inputs(case: Case) -> Tensors:
    """X (M, K), codes (V, K/2), scales (V, K/32); ids (M) in place of x for a tied table; uniforms (M) for a sample.

    Option "outside": four of the uniforms are none, and are not looked at before the launch.
    """
    M, V, K = case.shape
    if case.regime == "integers" and case.op != "lm_head_forward":  # small logits, so that their softmax has many terms
        codes, scales = regimes.integer_weights(case, (V, K), "w", spread=2, shift=-5)
    else:
        codes, scales = regimes.weights(case, (V, K))
    rng = regimes.generator(case, "choice")
    match case.option("data"):
        case "equal":
            codes, scales = codes[:1].repeat(V, 1), scales[:1].repeat(V, 1)
        case "repeated":
            rows = torch.arange(V) % -(-V // 3)
            codes, scales = codes[rows], scales[rows]
        case "spike":
            scales[V // 2] += 8
        case "hill":
            codes, scales = codes[:1].repeat(V, 1), scales[:1].repeat(V, 1)
            scales[0] += 2
        case "tiny":
            scales.fill_(10)
        case "close":  # the third column counts for the third row alone, the second for the others
            scales.fill_(127)
            codes[:, 0] = 2 + 16 * (torch.arange(V) % 4).to(torch.uint8)
            codes[:, 1] = 1
    inputs = {"codes": codes, "scales": scales}
    if "tied" in case.options:
        return inputs | {"ids": torch.from_numpy(rng.integers(0, V, M))}
    inputs["x"] = regimes.activations(case, (M, K))
    if case.option("data") == "close":
        ulp = 2.0**-22
        inputs["x"].zero_()[:, :3] = torch.tensor([[1, ulp, 0], [-1, -ulp, 0], [1, 0, ulp]])
    if case.op == "lm_head_sample":
        uniforms = torch.from_numpy(rng.integers(0, 2**24, M)).to(torch.float32) / 2.0**24
        uniforms[-1], uniforms[0] = 1 - 2.0**-24, 0.0 if M > 1 else uniforms[0]
        if "outside" in case.options:
            uniforms[1:5] = torch.tensor([-(2.0**-40), torch.nan, 1.0, 2.0**31])
        inputs["uniforms"] = uniforms
    return inputs
