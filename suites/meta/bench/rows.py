"""Small entries, clocks that are told, and records that no bench made: what tests of the bench share."""

from __future__ import annotations

import dataclasses

from mxharness import timing
from mxharness.bench import result
from mxharness.bench.entries import ENTRIES, Entry
from mxharness.figures import Ceilings, Timing

LIMITS = Ceilings(bandwidth=1e9, matrix_rate=1e12, source="a device that is told")
TINY = {
    "dequantize": (48, 64),
    "quantize": (48, 64),
    "gemm": (48, 64),
    "gemm_bias": (48, 64),
    "gemm_batch": (2, 48, 64),
    "gemm_persistent": (48, 64),
    "embedding": (100, 64),
    "rms_norm": (64,),
    "layer_norm": (64,),
    "swiglu": (64,),
    "apply_rope": (4, 32),
    "lm_head_greedy": (100, 64),
    "lm_head_topk": (100, 64),
    "swiglu_ffn": (64, 96),
    "attention_prefill": (4, 2, 32),
    "attention_prefill_batch": (2, 4, 2, 32),
    "attention_decode": (4, 2, 32, 40),
    "attention_decode_mxfp4": (4, 2, 32, 40),
    "kv_append": (2, 32, 40),
    "kv_append_mxfp4": (2, 32, 40),
    "moe": (8, 64, 32),
}
"""A shape of each operator that a CPU multiplies in a moment."""


def told(subjects, least_seconds, budget):
    """A timer that calls nobody: the kernel takes 10 us, its rivals 20, 30 .."""
    return {name: Timing(10.0 * (i + 1), 9.5 * (i + 1), 10.5 * (i + 1), 5) for i, name in enumerate(subjects)}


def replayed(subjects, least_seconds, budget):
    """A timer that makes a graph's calls without a graph, with its checks; the times are told."""
    for subject in subjects.values():
        before = subject.launched() if subject.launched else 0
        wanted = [subject.call(i).clone() for i in range(subject.copies)]
        outputs = [subject.call(i).clone() for i in range(subject.copies + 1)]
        timing.check_written(outputs, wanted, exact=subject.own)
        assert not subject.launched or subject.launched() - before >= len(wanted) + len(outputs)
    return told(subjects, least_seconds, budget)


def entry(op, rows=5, dtype="bf16"):
    """The operator's small shape."""
    build = next(one.build for one in ENTRIES if one.op == op)
    return Entry(op, "axes", TINY[op], 0 if op in ("dequantize", "quantize") else rows, dtype, build)


def record(*rows, **changes: object):
    """A bench on a GPU that nobody has. changes: of result.Bench."""
    facts = {
        "device_class": "sm_90",
        "unit": "a GPU",
        "driver": "580",
        "started": "2026-11-22T00:00:00Z",
        "seconds": 1.0,
        "ceilings": LIMITS,
        "copy_bandwidth": 3e12,
        "environment": {"torch": "2"},
    }
    return result.Bench(**{**facts, **changes}, rows={row.key: row for row in rows})


def row(us=10.0, spread=0.01, rows=16, **changes: object):
    """A row of gemm with one peer, a time and the spread of its repeats. changes: of result.Row."""
    made = result.Row(
        op="gemm",
        shape="4096x4096",
        axes="N K",
        rows=rows,
        variant="bf16",
        timing=Timing(us, us * (1 - spread / 2), us * (1 + spread / 2), 60, 40),
        working_set=1,
        nbytes=8_912_896,
        flops=536_870_912,
        limited="bytes",
        floor_us=3.0,
        error=0.0017,
        repeatable=True,
        invariant=True,
        reference="cuBLAS",
        peers={"cuBLAS": result.Peer(Timing(15.0, 14.9, 15.1, 60), 0.0017)},
        absent={"gemlite": "not installed"},
    )
    return dataclasses.replace(made, **changes)
