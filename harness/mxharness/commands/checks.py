"""`mxharness faults` and `mxharness probe`: does the harness see bugs, and does the hardware do what is assumed."""

from __future__ import annotations

import dataclasses

import click

from mxharness.commands import common


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
            ("name", "caught", "by"),
            [(result.name, "yes" if result.caught else "NO", result.detector) for result in results],
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
    """Compare a device's matrix instruction with its model, bit for bit."""
    from mxharness.probe import run_probe

    result = run_probe(device, seeds)
    if as_json:
        common.print_json(dataclasses.asdict(result))
    else:
        click.echo(result.message)
    return common.PASS if result.passed else common.MISMATCH
