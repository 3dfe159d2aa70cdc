"""`mxharness sanitize`: every operator under a tool that watches each memory access."""

from __future__ import annotations

import dataclasses

import click

from mxharness.commands import common


@click.command()
@click.option("--tool", "tools", multiple=True, metavar="NAME", help="Only this tool; repeatable.")
@click.option("--op", "names", multiple=True, metavar="NAME", help="Only this operator, or all of FILE.cu; repeatable.")
@click.option(
    "--cases",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Cheapest cases, and one of each further file of kernels; 0: all.",
)
@common.device_option
@common.json_option
def sanitize(tools: tuple[str, ...], names: tuple[str, ...], cases: int, device: str, as_json: bool) -> int:
    """Watch each memory access of the kernels: memcheck, racecheck, initcheck, undefined.

    On the host device by the harness's own checker, on a GPU by NVIDIA's compute-sanitizer, which does not know
    `undefined`. Exits 1 on any error, and where a tool saw no kernel of an operator.
    """
    from mxharness.ops import select
    from mxharness.sanitize import run_sanitize

    ops = [op for name in names for op in select(name)]
    rows = run_sanitize(device, tools or None, ops or None, cases=cases or None)
    good = sum(row.passed for row in rows)
    if as_json:
        common.print_json({"sanitize": [dataclasses.asdict(row) for row in rows], "passed": good == len(rows) > 0})
    else:
        common.print_table(
            "Memory accesses",
            ("operator", "tool", "on", "cases", "kernels seen", "errors"),
            [(row.op, row.tool, row.device, row.cases, row.kernels or "NONE", row.errors) for row in rows],
        )
        for row in rows:
            for message in row.messages:
                click.echo(f"{row.tool} {message}")
        kernels = sum(row.kernels for row in rows)
        verdict = "PASS" if good == len(rows) > 0 else "FAIL"
        click.echo(f"{verdict}: {good} of {len(rows)} clean, {kernels:,} kernels seen; each tool saw its planted error")
    return common.PASS if good == len(rows) > 0 else common.MISMATCH
