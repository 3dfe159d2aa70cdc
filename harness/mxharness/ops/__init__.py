"""Every consumer of MXFP4 weights. Adding one: a .cu, a module here, a name in OPS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from mxharness.errors import UserError
from mxharness.op import Case, Op, Tensors
from mxharness.ops import (
    attention,
    dequant,
    elementary,
    embedding,
    ffn,
    gemm,
    kv_cache,
    lm_head,
    mma,
    moe,
    norm,
    quantize,
)

OPS: tuple[Op, ...] = (
    quantize.OP,
    dequant.OP,
    mma.OP,
    elementary.OP,
    *norm.OPS,
    *ffn.OPS,
    *gemm.OPS,
    *embedding.OPS,
    *lm_head.OPS,
    *kv_cache.OPS,
    *attention.OPS,
    *moe.OPS,
)


def find(name: str) -> Op:
    """The operator called `name`; UserError, listing what exists, where there is none."""
    for op in OPS:
        if op.name == name:
            return op
    raise UserError(f"no operator '{name}'; there are {', '.join(op.name for op in OPS)}")


def select(name: str) -> tuple[Op, ...]:
    """The operator called `name`, or all whose kernels lie in the file `name`, with or without ".cu".

    UserError, listing what exists, where there is none.
    """
    named = tuple(op for op in OPS if op.name == name)
    found = named or tuple(op for op in OPS if name in (op.source, op.family))
    if not found:
        files = dict.fromkeys(op.source for op in OPS)
        names = ", ".join(op.name for op in OPS)
        raise UserError(f"no operator '{name}'; there are {names}; or all of {', '.join(files)}")
    return found


def costs(op: Op) -> Mapping[Case, int]:
    """The bytes of each case's inputs: what ranks cases by how long they take."""
    return _sizes(op.make_inputs, op.cases)


@cache
def _sizes(make_inputs: Callable[[Case], Tensors], cases: tuple[Case, ...]) -> Mapping[Case, int]:
    return {
        case: sum(tensor.numel() * tensor.element_size() for tensor in make_inputs(case).values()) for case in cases
    }


def cheapest(op: Op, count: int | None = None) -> tuple[Case, ...]:
    """The `count` cases with the smallest inputs, all of them for None, the smallest first."""
    return tuple(sorted(op.cases, key=costs(op).__getitem__)[:count])
