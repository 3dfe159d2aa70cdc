"""Rows as cells of a table, on a terminal and in a report."""

from __future__ import annotations

from collections.abc import Sequence

from mxharness.bench.result import Bench, Row
from mxharness.wording import counted

_FIXED = ("us", "floor", "share", "rate", "error", "bits")


def by_op(bench: Bench) -> dict[str, list[Row]]:
    """The rows of each operator, in the order of their types, shapes and row counts."""
    found: dict[str, list[Row]] = {}
    for row in sorted(bench.rows.values(), key=_order):
        found.setdefault(row.op, []).append(row)
    return found


def _order(row: Row) -> tuple[str, str, tuple[int, ...], int]:
    return row.op, row.variant, tuple(map(int, row.shape.split("x"))), row.rows


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Of one operator's table: what is measured of every kernel, then every peer that some row has."""
    peers = dict.fromkeys(name for row in rows for name in row.peers)
    return (rows[0].axes, "rows", "type", *_FIXED, *peers)


def cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """One row. A peer's cell: its time, and how many times faster the kernel is."""
    timing = row.timing
    fixed = (
        row.shape,
        str(row.rows or "-"),
        row.variant,
        f"{_us(timing.us)} ±{50 * timing.spread:.1f}%",
        _us(row.floor_us),
        f"{row.share:.0%}",
        rate(row),
        f"{row.error:.2g}",
        "same" if row.sound else "OTHER AGAIN" if not row.repeatable else "OTHER ALONE",
    )
    return (*fixed, *(_peer(row, name) for name in names[len(fixed) :]))


def rate(row: Row) -> str:
    """What the floor is made of: bytes a second, or operations a second where these are the floor."""
    bandwidth = row.nbytes / row.timing.us / 1e3
    operations = row.flops / row.timing.us / 1e3
    by_bytes = f"{bandwidth / 1e3:.3g} TB/s" if bandwidth >= 1e3 else f"{bandwidth:.3g} GB/s"
    by_operations = f"{operations / 1e3:.3g} TFLOP/s" if operations >= 1e3 else f"{operations:.3g} GFLOP/s"
    return by_operations if row.limited == "operations" else by_bytes


def absent(bench: Bench) -> dict[str, str]:
    """Peers that no row has or some row lacks, and why."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in bench.rows.values():
        for name, why in row.absent.items():
            found.setdefault(name, {}).setdefault(why, []).append(row.key)
    return {name: "; ".join(map(_where, whys, whys.values())) for name, whys in found.items()}


def verdict(bench: Bench) -> str:
    """PASS or FAIL: whether bits repeat and do not depend on the batch."""
    bad = [row.key for row in bench.rows.values() if not row.sound]
    if bench.failed:
        return f"FAIL: {'; '.join(f'{key}: {why}' for key, why in bench.failed.items())}"
    if bad:
        return f"FAIL: bits that do not repeat, or that depend on the batch: {', '.join(bad)}"
    return f"PASS: {counted(len(bench.rows), 'row')} with bits that repeat and do not depend on the batch"


def _peer(row: Row, name: str) -> str:
    peer = row.peers.get(name)
    if peer is None:
        return "-"
    error = "" if peer.error is None else f" err {peer.error:.1g}" if peer.error > 2 * row.error + 1e-3 else ""
    return f"{_us(peer.timing.us)} ({peer.timing.us / row.timing.us:.2f}x{error})"


def _us(number: float) -> str:
    return f"{number:,.0f}" if number >= 1e4 else f"{number:.4g}"


def _where(why: str, keys: Sequence[str]) -> str:
    return f"{why} ({keys[0] if len(keys) == 1 else counted(len(keys), 'row')})"
