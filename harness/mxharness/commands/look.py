"""`mxharness list` and `mxharness info`: what there is to test, what this machine has and lacks."""

from __future__ import annotations

from typing import Any

import click

from mxharness.commands import common

_OF_A_RUN = ("device", "device class", "arithmetic", "compile flags")
"""Facts of environment.describe that only a run has."""


@click.command("list")
@common.json_option
def list_(as_json: bool) -> int:
    """List what there is to test and to test with.

    Operators, input regimes, weight layouts, devices and baselines.
    """
    from mxharness import baseline
    from mxharness.catalogue import catalogue

    found = catalogue()
    operators, regimes, layouts = found["operators"], found["regimes"], found["layouts"]
    there = baseline.survey()
    stored = [
        {"name": f"{one.device_class}/{one.name}", "checks": one.checks, "created": one.created}
        for one in there.summaries
    ]
    stored += [{"name": f"{one.device_class}/{one.name}", "checks": 0, "created": one.why} for one in there.damaged]
    if as_json:
        common.print_json(
            {
                "operators": operators,
                "regimes": regimes,
                "layouts": layouts,
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
        "Inputs", ("what", "which"), [("regimes", ", ".join(regimes)), ("weight layouts", ", ".join(layouts))]
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
    from mxharness.device import presence

    try:
        reasons = {"host": presence.host(), "cuda": presence.cuda()}
    except ModuleNotFoundError as error:  # no torch: this command is where to learn that
        reasons = dict.fromkeys(("host", "cuda"), common.missing_package(error))
    return [{"name": name, "present": not reason, "missing": reason or ""} for name, reason in reasons.items()]


def _print_devices() -> None:
    rows = [(row["name"], "yes" if row["present"] else "no", row["missing"]) for row in devices()]
    common.print_table("Devices", ("name", "present", "what is missing"), rows)


def _print_dispatch() -> None:
    from mxharness.catalogue import catalogue

    try:
        found = catalogue()
    except ModuleNotFoundError:  # no torch: the devices' table says so
        return
    for what, columns, tables in (
        ("a GEMM", ("weights", "features", "from how many rows on which kernel, all with the same bits"), "dispatch"),
        ("attention", ("cache, head", "rows", "kernels, all with the same bits"), "attention"),
    ):
        for title, rows in found[tables].items():
            common.print_table(f"Kernels of {what}, {title}", columns, rows)
