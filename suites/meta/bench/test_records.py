"""Records of the bench: read back, and compared with each other."""

from __future__ import annotations

import dataclasses

import pytest
from mxharness.bench import compare, result
from mxharness.errors import UserError

from .rows import LIMITS, record, row


def test_a_record_is_read_back_as_it_was(tmp_path):
    made = record(row(error=float("nan"), invariant=None), row(rows=1, spread=0.02), filters=("--quick",))
    result.save(made, tmp_path / "bench.json")
    back = result.load(tmp_path / "bench.json")
    assert result.text(back) == (tmp_path / "bench.json").read_text()
    assert str(back.rows.pop("gemm 4096x4096 16 bf16").error) == "nan"
    assert back.rows == {key: one for key, one in made.rows.items() if one.rows == 1}
    assert (back.ceilings, back.filters, back.unit) == (LIMITS, ("--quick",), "a GPU")
    lines = (tmp_path / "bench.json").read_text().splitlines()
    assert sum('"gemm 4096x4096' in line for line in lines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read bench record .*: No such file"),
        ("{", "bench record .* is damaged"),
        ("{}", "is not a bench record: it has no api_version"),
        ('{"api_version": 99}', "has api_version 99 and this mxharness reads up to 1"),
        ('{"api_version": 1}', "is not a complete bench record"),
        ('{"api_version": 1, "rows": {"a": 1}}', "is not a complete bench record"),
    ],
)
def test_what_is_no_record_is_refused(content, message, tmp_path):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        result.load(path)


def test_a_planted_slowdown_is_named_and_one_within_the_spread_is_not():
    before = record(row(10.0), row(10.0, rows=1), row(10.0, 0.1, rows=64))
    after = record(row(10.5), row(10.3, rows=1), row(11.5, 0.1, rows=64))
    found = compare.compare(before, after, "sm_90")
    status = {moved.key.split()[2]: moved.status for moved in found.rows}
    assert status == {"16": "slower", "1": "same", "64": "same"}  # 4 % at least, else both spreads: 20 % of 64
    assert not found.passed
    assert found.first_line.startswith("FAIL: 1 slower: gemm 4096x4096 16 bf16; 3 rows against sm_90, 2 as fast")
    assert "10 -> 10.5 us, 1.050x; the spread explains 1.040x; cuBLAS 1.000x" in found.failing[0].message
    assert compare.compare(after, before, "sm_90").first_line == "PASS: 3 rows against sm_90, 2 as fast, 1 faster"


def test_rows_that_are_new_gone_or_unsound():
    before, after = record(row(), row(rows=1)), record(row(repeatable=False), row(rows=4))
    found = {moved.key.split()[2]: moved.status for moved in compare.compare(before, after, "x").rows}
    assert found == {"16": "unsound", "1": "vanished", "4": "new"}
    narrowed = dataclasses.replace(after, filters=("--rows 4",))
    assert "1" not in {moved.key.split()[2] for moved in compare.compare(before, narrowed, "x").rows}
    alone = compare.compare(before, record(row(invariant=False), row(rows=1)), "x")
    assert [moved.message for moved in alone.failing] == ["depends on the batch"]


def test_another_unit_or_driver_is_refused_unless_it_is_named():
    before, after = record(row()), record(row(), unit="another GPU", driver="590")
    message = "the unit was a GPU and is another GPU and the driver was 580 and is 590; --despite unit --despite driver"
    with pytest.raises(UserError, match=message):
        compare.compare(before, after, "x")
    with pytest.raises(UserError, match="the driver was 580 and is 590; --despite driver compares all the same"):
        compare.compare(before, after, "x", ["unit"])
    found = compare.compare(before, after, "x", ["unit", "driver"])
    assert found.passed
    assert found.differs == (("unit", "a GPU", "another GPU"), ("driver", "580", "590"))
