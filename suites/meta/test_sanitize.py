"""What compute-sanitizer prints is read right: errors, hazards, nothing to see, a tool that died; which cases run."""

from __future__ import annotations

import pytest
from mxharness.errors import UserError
from mxharness.faults.launched import launched
from mxharness.ops import cheapest, find
from mxharness.sanitize import Sanitized, chosen, parse

RAN = '{"launches": {"gemm": 12, "norm": 3}}\n'
HEAD = "========= COMPUTE-SANITIZER\n"
MEMCHECK = f"""{HEAD}========= Invalid __global__ write of size 1 bytes
=========     at quantize_fp32+0x8f0
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f8e20000000 is out of bounds
=========     and is 1,099,511,627,776 bytes after the nearest allocation
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = f"""{HEAD}========= Error: Race reported between Write access at rms_norm_bf16+0x3c0
=========     and Read access at rms_norm_bf16+0x450 [128 hazards]
=========
{RAN}========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = f"""{HEAD}========= Uninitialized __global__ memory read of size 1 bytes
=========     at quantize_fp32+0x1a0
=========     by thread (31,0,0) in block (0,0,0)
{RAN}========= ERROR SUMMARY: 64 errors
========= ERROR SUMMARY: 54 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""


@pytest.mark.parametrize(
    ("tool", "text", "errors", "first"),
    [
        ("memcheck", MEMCHECK, 2, "Invalid __global__ write of size 1 bytes"),
        ("racecheck", RACECHECK, 1, "Error: Race reported between Write access at rms_norm_bf16+0x3c0"),
        ("initcheck", INITCHECK, 64, "Uninitialized __global__ memory read of size 1 bytes"),
    ],
)
def test_errors_are_counted_and_told_in_the_tools_words(tool, text, errors, first):
    visit = parse(tool, text)
    assert visit.errors == errors
    assert visit.lines[0] == first
    assert len(visit.lines) == 3 or tool == "racecheck"


@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ],
)
def test_a_clean_run_has_its_launches_and_no_words(tool, summary):
    visit = parse(tool, f"{HEAD}{RAN}========= {summary}\n")
    assert (visit.errors, visit.launches, visit.lines) == (0, {"gemm": 12, "norm": 3}, ())


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("", "nothing printed"),
        (f"{HEAD}========= Error: Target application terminated before first instrumented API call\n", "Error: Target"),
        (f"{HEAD}{RAN}========= Internal Sanitizer Error: device lost\n\n", "Internal Sanitizer Error: device lost"),
    ],
)
def test_a_tool_without_a_summary_proves_nothing(text, last):
    with pytest.raises(UserError, match=f"compute-sanitizer --tool memcheck gave no summary: .*{last}"):
        parse("memcheck", text)


def test_a_process_that_died_before_its_end_proves_nothing_unless_an_error_was_planted():
    text = f"{HEAD}Killed\n========= ERROR SUMMARY: 0 errors\n"
    with pytest.raises(UserError, match="the process under compute-sanitizer --tool memcheck ended before all"):
        parse("memcheck", text)
    assert parse("memcheck", text, planted=True).errors == 0


def test_a_tool_that_saw_no_kernel_or_an_error_has_not_passed():
    def passed(kernels, errors):
        return Sanitized("memcheck", "gemm", "sm_90", 8, kernels, errors, ()).passed

    assert passed(1, 0)
    assert not passed(0, 0)
    assert not passed(1, 1)


def test_every_file_of_kernels_is_met_however_few_cases_are_asked_for():
    op = find("attention")
    cases = chosen(op, 1, "host")
    assert cases[0] == cheapest(op, 1)[0]
    assert len(cases) == len(set(cases)) < 5
    met = {source for case in cases for source in launched(op.name, case, "host")}
    assert met == {"attention.cu", "attention_many.cu", "attention_wide.cu"}
    assert chosen(op, None, "host") == list(cheapest(op))
