"""`mxharness probe`: which model does the hardware follow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from mxharness.commands import common

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.probe import ProbeResult


@click.command()
@common.device_option
@click.option("--seeds", type=click.IntRange(min=1), default=64, show_default=True, help="How many random inputs.")
@click.option("--no-store", is_flag=True, help="Keep nothing of what was found.")
@common.json_option
def probe(device: str, seeds: int, no_store: bool, as_json: bool) -> int:
    """Find the model that the tensor core follows, bit for bit, and keep it for the judge.

    Hopper's, or the one of a family of block lengths, fraction bits and roundings that directed inputs single out and
    random ones confirm. On the host device, which is Hopper's model in C++, this checks the C++ against the Python.
    Exits 1 where no model holds.
    """
    from mxharness.device import open_device
    from mxharness.probe import run_probe

    opened = open_device(device)
    result = run_probe(opened, seeds)
    reason, stored, why = _keep(opened, result, store=not no_store)
    passed = result.passed and not reason
    if as_json:
        findings = [{**dataclasses.asdict(found), "model": found.model} for found in result.findings]
        document = {**dataclasses.asdict(result), "passed": passed, "findings": findings}
        common.print_json({**document, "contradiction": reason, "stored": stored})
    else:
        click.echo(f"FAIL: {reason}" if reason else result.message)
        _print(result)
        click.echo(f"kept for later runs: {stored}" if stored else f"nothing kept: {why}")
    return common.PASS if passed else common.MISMATCH


def _keep(device: Device, result: ProbeResult, *, store: bool) -> tuple[str, str, str]:
    """In what the result contradicts the fact that came with this version, where it was stored, and why it was not."""
    from mxharness import environment, facts
    from mxharness.probe import as_fact

    described = environment.describe(device)
    fact = as_fact(result, described["gpu"], described["driver"])
    known = facts.shipped(device.device_class)
    if known is not None:
        return facts.contradiction(known, fact), "", f"what holds of {device.device_class} came with this version"
    if any(found.blind for found in result.findings):
        return "", "", "it proves nothing"
    return ("", str(facts.store(fact)), "") if store else ("", "", "--no-store")


def _print(result: ProbeResult) -> None:
    common.print_table(
        f"{result.device_class} against the model",
        ("dtype", "inputs", "results", "other bits"),
        [(row.dtype, row.regime, f"{row.elements:,}", f"{row.mismatches:,}") for row in result.rows],
    )
    names = [found.dtype for found in result.findings]
    shares = [{name: f"{share:.1%}" for name, share in found.neighbours.items()} for found in result.findings]
    common.print_table(
        "Neighbouring models on the same inputs: each must differ, or the inputs could not tell",
        ("model with", *(f"{name}: other bits" for name in names)),
        [
            (name, *(share.get(name, "") for share in shares))
            for name in dict.fromkeys(key for s in shares for key in s)
        ],
    )
    common.print_table(
        "What else was measured",
        ("what", "found"),
        [
            ("sums of integers are exact up to", f"{result.exact_integers:,}"),
            ("2^24 and 15 ones are 2^24 and", f"{result.past_exact:g}"),
            ("unit roundoff of a chain's bound", f"{result.unit_roundoff:.3g}"),
            *(
                (
                    f"{found.dtype}: results moved by another order",
                    f"{found.moved_inside} inside steps, {found.moved_across} across",
                )
                for found in result.findings
            ),
            *((f"{found.dtype}: that another order of steps moves", found.moved_across) for found in result.findings),
        ],
    )
