"""`mxharness list` and `mxharness info`: what there is to test, what this machine has and lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mxharness.commands import common

if TYPE_CHECKING:
    from mxharness.op import Op


_OF_A_RUN = ("device", "device class", "arithmetic", "compile flags")
"""Facts of environment.describe that only a run has."""


@click.command("list")
@common.json_option
def list_(as_json: bool) -> int:
    """List what there is to test and to test with.

    Operators, input regimes, weight layouts, devices and baselines.
    """
    from mxharness import baseline
    from mxharness.mxfp4 import LAYOUTS
    from mxharness.ops import OPS

    operators = [_operator(op) for op in OPS]
    there = baseline.survey()
    stored = [
        {"name": f"{found.device_class}/{found.name}", "checks": found.checks, "created": found.created}
        for found in there.summaries
    ]
    stored += [{"name": f"{one.device_class}/{one.name}", "checks": 0, "created": one.why} for one in there.damaged]
    regimes = sorted({case.regime for op in OPS for case in op.cases})
    if as_json:
        common.print_json(
            {
                "operators": operators,
                "regimes": regimes,
                "layouts": list(LAYOUTS),
                "devices": devices(),
                "baselines": stored,
            }
        )
        return common.PASS
    common.print_table(
        "Operators",
        ("name", "cases", "axes", "kernels", "gates"),
        [(op["name"], op["cases"], op["axes"], op["source"], ", ".join(op["gates"])) for op in operators],
    )
    common.print_table(
        "Inputs", ("what", "which"), [("regimes", ", ".join(regimes)), ("weight layouts", ", ".join(LAYOUTS))]
    )
    _print_devices()
    common.print_table(
        "Baselines",
        ("name", "checks", "created"),
        [(row["name"], row["checks"], row["created"]) for row in stored] or [("none", "", "")],
    )
    return common.PASS


@click.command()
@common.json_option
def info(as_json: bool) -> int:
    """Say what this machine has, what it lacks and what to install."""
    from mxharness import environment

    facts = environment.describe()
    if as_json:
        common.print_json({"environment": facts, "devices": devices()})
        return common.PASS
    shown = [(what, value) for what, value in facts.items() if what not in _OF_A_RUN]
    common.print_table("Environment", ("what", "value"), shown)
    _print_devices()
    _print_dispatch()
    ready = [row["name"] for row in devices() if row["present"]]
    click.echo(f"`mxharness run` will use {ready[-1]}" if ready else "`mxharness run` needs one of the devices above")
    return common.PASS


def devices() -> list[dict[str, Any]]:
    """Every device: its name, whether it can be had here and, where not, what is missing."""
    try:
        from mxharness.device import cuda, host
    except ModuleNotFoundError as error:  # no torch: this command is where to learn that
        reasons: dict[str, str | None] = dict.fromkeys(("host", "cuda"), common.missing_package(error))
    else:
        reasons = {"host": host.missing(), "cuda": cuda.missing()}
    return [{"name": name, "present": not reason, "missing": reason or ""} for name, reason in reasons.items()]


def _print_devices() -> None:
    rows = [(row["name"], "yes" if row["present"] else "no", row["missing"]) for row in devices()]
    common.print_table("Devices", ("name", "present", "what is missing"), rows)


def _print_dispatch() -> None:
    try:
        from mxharness.functional import dispatch
    except ModuleNotFoundError:  # no torch: the devices' table says so
        return
    for title, device_class in (("Hopper and the host device", "sm_90"), ("other GPUs", "sm_80")):
        common.print_table(
            f"Kernels of a GEMM, {title}",
            ("weights", "rows", "kernels, all with the same bits"),
            dispatch.table(device_class),
        )


def _operator(op: Op) -> dict[str, Any]:
    from mxharness.judge import gates

    found = {gate: None for case in op.cases for gate in gates(op, case)}
    return {"name": op.name, "cases": len(op.cases), "axes": op.axes, "source": op.source, "gates": list(found)}
