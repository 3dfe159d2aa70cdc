"""`mxharness fetch`: get a model into the cache."""

from __future__ import annotations

import click

from mxharness.commands import common


@click.command()
@click.argument("name")
@common.json_option
def fetch(name: str, as_json: bool) -> int:
    """Get a model into the cache, checked.

    NAME is "smollm2": SmolLM2-135M-Instruct, 98 MB. Prints where the file lies.
    """
    from mxharness import fetch as fetching

    path = fetching.fetch(name, progress=not as_json)
    if as_json:
        wanted = fetching.artefact(name)
        common.print_json({"name": name, "path": path, "sha256": wanted.file.sha256, "licence": wanted.licence})
    else:
        click.echo(str(path))
    return common.PASS
