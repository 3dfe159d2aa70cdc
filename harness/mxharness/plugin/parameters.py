"""What a test is run for: every operator, or every case of every operator under some gates."""

from __future__ import annotations

from typing import get_args

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise over operators: `op` alone, or (op, case, gate) under the gates that a mark `gates` names."""
    from mxharness import fuzz
    from mxharness.judge import gates
    from mxharness.op import Gate
    from mxharness.ops import OPS

    mark = metafunc.definition.get_closest_marker("gates")
    if mark is not None:
        unknown = set(mark.args) - set(get_args(Gate))
        if unknown or not mark.args:
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid}: no gate {', '.join(sorted(unknown)) or 'named'}; there are "
                f"{', '.join(get_args(Gate))}"
            )
        checks = [
            pytest.param(op, case, gate, id=f"{case}-{gate}")
            for op in OPS
            for case in op.cases
            for gate in gates(op, case)
            if gate in mark.args
        ]
        metafunc.parametrize(("op", "case", "gate"), checks)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", OPS, ids=str)
        if "random_check" in metafunc.fixturenames:
            option = metafunc.config.option
            metafunc.parametrize("part", fuzz.parts(option.fuzz, option.fuzz_seed), ids=str)
