"""`mxharness baseline show | history | prune`: what baselines say, one by one and over time."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.errors import UserError
from mxharness.wording import counted

if TYPE_CHECKING:
    from mxharness.baseline import Baseline, Damaged, Root
    from mxharness.history import Growth, Series, Step

at_option = click.option(
    "--at", metavar="FOLDER|URL", help="Where the baselines lie, as s3://bucket/baselines.  [env: MXHARNESS_BASELINES]"
)
_class_argument = click.argument("device_class", metavar="CLASS")


@click.command()
@click.argument("name", metavar="[CLASS/]NAME")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Show every check of this operator.")
@at_option
@common.json_option
def show(*, name: str, ops: tuple[str, ...], at: str | None, as_json: bool) -> int:
    """Show what a baseline holds."""
    found = named(name, at)
    by_op: defaultdict[str, list[tuple[str, dict[str, object]]]] = defaultdict(list)
    for key, entry in sorted(found.checks.items()):
        by_op[str(entry["op"])].append((key, entry))
    for op in ops:
        if op not in by_op:
            raise UserError(f"{found.device_class}/{found.name} has no operator '{op}'; it has {', '.join(by_op)}")
    if as_json:
        document = dataclasses.asdict(found)
        document["checks"] = {key: row for key, row in found.checks.items() if not ops or row["op"] in ops}
        common.print_json(document)
        return common.PASS
    if ops:
        columns = ("ratio", "max_ulp", "nmse", "digest")
        for op in ops:
            lines = [(key, *(common.short(entry[column]) for column in columns)) for key, entry in by_op[op]]
            common.print_table(op, ("check", *columns), lines)
        return common.PASS
    common.print_table("Environment", ("what", "value"), sorted(found.environment.items()))
    rows = [(op, len(checks), common.short(max(_ratio(row) for _, row in checks))) for op, checks in by_op.items()]
    common.print_table("Operators", ("name", "checks", "largest error / bound"), rows)
    if found.perplexity:
        measured = [(key, common.short(row["perplexity"]), row.get("kl", "-")) for key, row in found.perplexity.items()]
        common.print_table("Perplexity", ("of", "perplexity", "KL"), measured)
    if found.kernels:
        names = ("registers", "stack", "spill_stores", "spill_loads", "shared")
        spent = [(kernel, *(row.get(column, "-") for column in names)) for kernel, row in found.kernels.items()]
        common.print_table("Kernels", ("kernel", *names), spent)
    if found.speed:
        click.echo(f"Speed: {counted(len(found.speed.rows), 'row')} on {found.speed.unit}; --json has them\n")
    caught = sum(bool(row["caught"]) for row in found.faults.values())
    faults = f", {caught} of {len(found.faults)} planted faults caught" if found.faults else ""
    accepted = f"; growth accepted: {found.accepted}" if found.accepted else ""
    click.echo(
        f"{found.device_class}/{found.name}: {counted(len(found.checks), 'check')}{faults}, {found.created}{accepted}"
    )
    return common.PASS


@click.command()
@_class_argument
@click.option("--op", "ops", multiple=True, metavar="OP", help="Look at this operator only.")
@at_option
@common.json_option
def history(*, device_class: str, ops: tuple[str, ...], at: str | None, as_json: bool) -> int:
    """Show what moved from version to version, and what has grown over them.

    CLASS is a device class, as sm_90. Exits 1 where something has grown past its budget, in many small moves or in few,
    and where a version cannot be read.
    """
    from mxharness import baseline as store
    from mxharness import history as over_time

    there = store.survey(device_class, at)
    versions = over_time.in_order(there.versions)
    if not versions:
        raise UserError(_none(there.damaged, device_class, "`mxharness baseline list` shows what there is"))
    known = {str(entry["op"]) for version in versions for entry in version.checks.values()}
    if unknown := set(ops) - known:
        raise UserError(f"no baseline of {device_class} has '{min(unknown)}'; there are {', '.join(sorted(known))}")
    every = [series for series in over_time.all_series(versions) if not ops or series.op in ops]
    seen = [(series, step) for series in every for step in over_time.steps(series)]
    grown = [(series, found) for series in every if (found := over_time.growth(series)).exceeded]
    word = "FAIL" if grown or there.damaged else "PASS"
    line = (
        f"{word}: {counted(len(versions), 'version')} of {device_class}, {versions[0].name} to {versions[-1].name}; "
        f"{counted(len(seen), 'step')}; {len(grown)} of {len(every):,} series grown past their budget"
    )
    if there.damaged:
        line += f"; {counted(len(there.damaged), 'version')} cannot be read"
    if as_json:
        common.print_json(
            {
                "passed": not (grown or there.damaged),
                "verdict": line,
                "damaged": [dataclasses.asdict(one) for one in there.damaged],
                **_document(versions, every, seen, grown),
            }
        )
    else:
        columns = ("version", "created", "checks", "new", "vanished", "other bits", "not comparable", "accepted")
        common.print_table(device_class, columns, _lines(versions, ops))
        rows = [(s.key, step.version, f"{step.before:.4g} -> {step.after:.4g}") for s, step in seen]
        if rows:
            common.print_table("Steps", ("what", "at", "level"), rows)
        if grown:
            common.print_table("Grown", ("what", "how"), [(s.key, found.sentence(s.quantity)) for s, found in grown])
        print_damaged(there.damaged)
        click.echo(line)
        if grown:
            click.echo("where the growth is meant: mxharness baseline create NAME --accept-growth WHY")
    return common.MISMATCH if grown or there.damaged else common.PASS


@click.command()
@_class_argument
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest stay.")
@click.option("--delete", is_flag=True, help="Delete them; without it they are only named.")
@at_option
@common.json_option
def prune(*, device_class: str, keep: int, delete: bool, at: str | None, as_json: bool) -> int:
    """Take away all but the newest baselines of CLASS.

    One that cannot be read stays, because nobody knows how old it is; then this exits 1.
    """
    from mxharness import baseline as store

    root = at or store.roots()[0]
    there = store.survey(device_class, root)
    found = there.summaries
    if not found:
        raise UserError(_none(there.damaged, device_class, "nothing to prune", f" at {root}"))
    old = sorted(found, key=lambda one: (one.created, one.name))[:-keep]
    if delete:
        for one in old:
            store.remove(device_class, one.name, root)
    names = [f"{one.device_class}/{one.name}" for one in old]
    if as_json:
        damaged = [dataclasses.asdict(one) for one in there.damaged]
        common.print_json({"deleted": delete, "baselines": names, "kept": len(found) - len(old), "damaged": damaged})
    else:
        word = "deleted" if delete else "would delete (--delete does)"
        left = f"{word} {', '.join(names)}; {len(found) - len(old)} of {device_class} left"
        click.echo(left if names else f"nothing to prune: there are {len(found)} of {device_class}")
        print_damaged(there.damaged)
    return common.MISMATCH if there.damaged else common.PASS


def print_damaged(damaged: Sequence[Damaged], *, err: bool = False) -> None:
    """A line for every baseline that cannot be read. err: to standard error."""
    for one in damaged:
        click.echo(f"{one.device_class}/{one.name} is left out: {one.why}", err=err)


def _none(damaged: Sequence[Damaged], device_class: str, then: str, where: str = "") -> str:
    """Why there is nothing to look at: no baseline at all, or none that can be read."""
    return damaged[0].why if damaged else f"no baseline of {device_class}{where}; {then}"


def named(name: str, root: Root) -> Baseline:
    """CLASS/NAME, or NAME where one device class alone has it."""
    from mxharness import baseline as store

    device_class, _, plain = name.rpartition("/")
    if device_class:
        return store.load(device_class, plain, root)
    store.checked_name(plain)
    classes = [held for held, there in sorted(store.places(root)) if there == plain]
    if len(classes) > 1:
        raise UserError(f"{plain} is in {', '.join(classes)}; name one, as {classes[0]}/{plain}")
    return store.load(classes[0] if classes else "host", plain, root)


def _lines(versions: Sequence[Baseline], ops: tuple[str, ...]) -> list[tuple[object, ...]]:
    """A row a version: what it has that the one before had not, and the other way round."""
    from mxharness.history import same_ruler

    def checks(version: Baseline) -> dict[str, dict[str, object]]:
        return {key: entry for key, entry in version.checks.items() if not ops or entry["op"] in ops}

    first = versions[0]
    rows: list[tuple[object, ...]] = [
        (first.name, first.created, len(checks(first)), "-", "-", "-", "-", first.accepted)
    ]
    for before, after in pairwise(versions):
        old, new = checks(before), checks(after)
        both = old.keys() & new.keys()
        other = sum(old[key]["digest"] != new[key]["digest"] for key in both)
        unlike = sum(not same_ruler(before, after, key) for key in both)
        gone, fresh = len(old.keys() - new.keys()), len(new.keys() - old.keys())
        rows.append((after.name, after.created, len(new), fresh, gone, other, unlike, after.accepted))
    return rows


def _document(
    versions: Sequence[Baseline],
    every: Sequence[Series],
    seen: Sequence[tuple[Series, Step]],
    grown: Sequence[tuple[Series, Growth]],
) -> dict[str, object]:
    return {
        "versions": [
            {
                "name": one.name,
                "created": one.created,
                "commit": one.environment.get("commit"),
                "checks": len(one.checks),
                "accepted": one.accepted,
            }
            for one in versions
        ],
        "operators": [dataclasses.asdict(series) for series in every if series.key == series.op],
        "perplexity": [dataclasses.asdict(series) for series in every if series.op == "perplexity"],
        "steps": [{"key": series.key, "op": series.op, **dataclasses.asdict(step)} for series, step in seen],
        "grown": [{"key": series.key, "op": series.op, **dataclasses.asdict(found)} for series, found in grown],
    }


def _ratio(entry: dict[str, object]) -> float:
    value = entry["ratio"]
    return float(value) if isinstance(value, int | float) else 0.0
