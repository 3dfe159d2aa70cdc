"""What to type to repeat one row of a run: a test, an operator's random cases, a planted fault, a perplexity.

A test's node id is repeated with pytest where its file lies below the working directory, and with `mxharness run -k`
anywhere else: the suites that came with the package are there, too. report/checks.py has the command of a check.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_OUTSIDE_WORDS = re.compile(r"[^\w:+\-.\[\]\\/]+")
"""What pytest's -k does not read as a part of a name."""


def expression(name: str) -> str:
    """What pytest's -k selects the test `name` by; "=" and the like may not stand in it."""
    return " and ".join(filter(None, _OUTSIDE_WORDS.split(name)))


def of_test(device: str, node_id: str, options: Sequence[str] = ()) -> str:
    """Runs one test, or all parameters of a test function. device: "host" or "cuda"; options: those of the plugin."""
    path, _, name = node_id.partition("::")
    if Path(path).is_file():
        return shlex.join(("pytest", "--device", device, *options, node_id))
    function = name.rpartition("::")[2]
    run = ("mxharness", "run", "--device", device, "--no-perplexity", *options)
    return shlex.join((*run, "-k", expression(function))) if function else shlex.join(run)


def of_random(device: str, node_id: str, op: str, examples: int, seed: int) -> str:
    """Draws the same random cases of an operator again. node_id: of the test that drew them."""
    options = ("--op", op, "--fuzz", str(examples), "--fuzz-seed", str(seed))
    return of_test(device, node_id.partition("[")[0], options)


def of_fault(device_class: str, name: str) -> str:
    """Plants one fault again, on the kind of device that it was planted on."""
    return shlex.join(("mxharness", "faults", name, "--device", "host" if device_class == "host" else "cuda"))


def of_perplexity(device: str, model: str, windows: int) -> str:
    """Measures a model on the same windows of the default text, three ways."""
    return shlex.join(("mxharness", "perplexity", "--model", model, "--windows", str(windows), "--device", device))
