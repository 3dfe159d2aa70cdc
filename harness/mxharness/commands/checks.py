"""`mxharness faults`: does the harness see bugs."""

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
