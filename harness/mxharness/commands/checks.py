"""`mxharness faults` and `mxharness probe`: does the harness see bugs, and does the hardware do what is assumed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from mxharness.commands import common

if TYPE_CHECKING:
    from mxharness.probe import ProbeResult


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@common.device_option
@common.json_option
def faults(names: tuple[str, ...], device: str, as_json: bool) -> int:
    """Plant known bugs and report which were caught.

    All of them, or those NAMEd; exits 1 unless every one was caught.
    """
    from mxharness.faults import run_faults

    results = run_faults(device, names or None)
    caught = sum(result.caught for result in results)
    if as_json:
        rows = [dataclasses.asdict(result) for result in results]
        common.print_json({"faults": rows, "score": caught / len(results) if results else 0.0})
    else:
        common.print_table(
            "Planted faults",
            ("name", "caught", "by", "on", "symptom"),
            [
                (result.name, "yes" if result.caught else "NO", result.detector, result.device, result.symptom)
                for result in results
            ],
        )
        click.echo(
            f"{'PASS' if caught == len(results) > 0 else 'FAIL'}: {caught} of {len(results)} planted faults caught"
        )
    return common.PASS if caught == len(results) > 0 else common.MISMATCH


@click.command()
@common.device_option
@click.option("--seeds", type=click.IntRange(min=1), default=64, show_default=True, help="How many random inputs.")
@common.json_option
def probe(device: str, seeds: int, as_json: bool) -> int:
    """Compare the tensor core with its model, bit for bit.

    On the host device, which is that model in C++, this checks the C++ against the Python.
    """
    from mxharness.probe import run_probe

    result = run_probe(device, seeds)
    if as_json:
        common.print_json(dataclasses.asdict(result))
    else:
        _print_probe(result)
    return common.PASS if result.passed else common.MISMATCH


def _print_probe(result: ProbeResult) -> None:
    common.print_table(
        f"{result.device_class} against the model",
        ("dtype", "inputs", "results", "other bits"),
        [(row.dtype, row.regime, f"{row.elements:,}", f"{row.mismatches:,}") for row in result.rows],
    )
    common.print_table(
        "Neighbouring models on the same inputs: each must differ, or the inputs could not tell",
        ("step x fraction bits", "results with other bits"),
        [(name, f"{share:.1%}") for name, share in result.neighbours.items()],
    )
    click.echo(result.message)
