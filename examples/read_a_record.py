"""Read run.json from Python: the five checks that came closest to their bound.

Usage: python examples/read_a_record.py mxharness-out/run.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from mxharness.record import load, verdict


def main(path: str) -> None:
    """Print the verdict of the run in `path` and its five closest checks."""
    run = load(Path(path))
    print(verdict(run).first_line)
    bound = [outcome for outcome in run.outcomes if outcome.gate == "bound"]
    for outcome in sorted(bound, key=lambda outcome: outcome.ratio, reverse=True)[:5]:
        print(f"{outcome.ratio:8.4f} of the bound, {outcome.max_ulp:g} ulp: {outcome.case}")


if __name__ == "__main__":
    main(sys.argv[1])
