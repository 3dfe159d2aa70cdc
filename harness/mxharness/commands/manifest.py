"""`mxharness manifest`: what a whole run must execute, against what is collected now."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness import paths
from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.manifest import Manifest


@click.command()
@click.option("--write", is_flag=True, help="Bless what is collected now: write it into the checkout's manifest.")
@common.json_option
def manifest(*, write: bool, as_json: bool) -> int:
    """Compare the suites with the manifest of what a run must execute.

    Exits 0 when they agree or the manifest was written, 1 when they differ.
    """
    from mxharness import manifest as manifests
    from mxharness.document import write_atomically

    root = paths.checkout()
    if write and root is None:
        raise UserError("an installed mxharness has the manifest it came with; --write needs a checkout")
    path = paths.root() / manifests.FILE
    committed = manifests.Manifest() if write and not path.is_file() else manifests.load(paths.root())
    collected = collect()
    difference = manifests.compare(committed, collected)
    lines = [
        *(f"- {one}" for one in sorted(difference.vanished.ids)),
        *(f"+ {one}" for one in sorted(difference.new.ids)),
    ]
    if write:
        write_atomically(path, manifests.render(collected))
    held = f"{len(collected.ids):,} tests, {len(collected.checks):,} of them checks"
    if difference:
        changes = f"{len(difference.vanished.ids):,} vanished, {len(difference.new.ids):,} new"
        word = f"{manifests.FILE} written: " if write else "FAIL: the suites differ from the manifest: "
        first_line = f"{word}{'; '.join((changes, *difference.lost(), held))}"
    else:
        first_line = f"PASS: the suites are the manifest: {held}"
    if as_json:
        document = {"passed": write or not difference, "verdict": first_line, "digest": collected.digest}
        lists = {"vanished": sorted(difference.vanished.ids), "new": sorted(difference.new.ids)}
        common.print_json({**document, **lists, "written": path if write else None})
    else:
        for line in (first_line, *lines):
            click.echo(line)
        if difference and not write:
            click.echo(manifests.BLESS)
    return common.PASS if write or not difference else common.MISMATCH


def collect() -> Manifest:
    """What the suites hold now, from a pytest in a process of its own. Raises UserError where they do not load."""
    from mxharness import manifest as manifests
    from mxharness.commands.running import Request, environment, pytest_arguments

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.txt"
        arguments = [*pytest_arguments(Request(workers="0"), "host"), "--collect-only", "--manifest-to", str(path)]
        command = (sys.executable, "-P", "-m", "pytest", *arguments)  # -P keeps the working directory off sys.path
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            lines = [line for line in done.stdout.splitlines() if line.startswith(("ERROR", "E "))]
            why = (
                lines[-1]
                if lines
                else (done.stderr.strip().splitlines() or [f"pytest ended with code {done.returncode}"])[-1]
            )
            raise UserError(f"the suites cannot be collected: {why.strip()}")
        return manifests.parse(path.read_text(encoding="utf-8"))
