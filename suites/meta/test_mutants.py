"""The generator of mutants: each operator says what it does, code alone is touched, a sample is fair and repeatable."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from mxharness.device import open_device
from mxharness.device.source import Sources, shipped
from mxharness.errors import UserError
from mxharness.execution import execute
from mxharness.faults import detectors, mutation
from mxharness.faults.mutants import OPERATORS, Mutant, generate, mask, sample
from mxharness.faults.mutation import Tried, launches, reasons, run_mutants, score, try_change, units
from mxharness.functional.dispatch import GATED
from mxharness.ops import select
from mxharness.sandbox import Lost


def edited(text, operator):
    """The text under every edit of one operator."""
    return [text[:start] + new + text[end:] for start, end, new in OPERATORS[operator](mask(text, cuda=False))]


@pytest.mark.parametrize(
    ("operator", "text", "results"),
    [
        ("comparison", "a < b;", ["a <= b;"]),
        ("comparison", "if (a == b) c >= d;", ["if (a != b) c >= d;", "if (a == b) c > d;"]),
        ("comparison", "template <class T> f(static_cast<int>(x), p->q);", []),
        ("arithmetic", "a + b * c;", ["a - b * c;", "a + b + c;"]),
        ("arithmetic", "const float* x = *y; x += 1;", ["const float* x = *y; x -= 1;"]),
        ("intrinsic", "__fadd_rn(a, b)", ["__fsub_rn(a, b)"]),
        ("logic", "a && b || c", ["a || b || c", "a && b && c"]),
        ("shift", "a << 16", ["a << 17", "a << 15", "a >> 16"]),
        ("constant", "x = 7;", ["x = 8;", "x = 6;"]),
        ("constant", "x = 0u; y << 3;", ["x = 1u; y << 3;"]),
        ("constant", "x = 0xff;", ["x = 0x100;", "x = 0xfe;"]),
        ("constant", "x = 1.5f;", ["x = (1.5f + 1.0f);"]),
        ("constant", "float x[32], y[2][4]; std::uint32_t z;", []),
        ("index", "x[i] = y[j][2];", ["x[(i) + 1] = y[j][2];", "x[i] = y[(j) + 1][2];", "x[i] = y[j][(2) + 1];"]),
        ("index", "__shared__ float sums[WARPS][8]; auto [a, b] = f([&](int c) { return c; });", []),
        ("barrier", "x; __syncthreads(); y;", ["x; (void)0; y;"]),
        ("swapped operands", "a.b(c) - d[e];", ["d[e] - a.b(c);"]),
        ("swapped operands", "static_cast<float>(a) / b;", ["b / static_cast<float>(a);"]),
        ("swapped arguments", "y = f(a + 1, g(b), c);", ["y = f(g(b), a + 1, c);"]),
        ("swapped arguments", "float f(float a, float b) { return max(a, b); }", []),
        ("guard", "if (i >= n) return;", ["if (false && (i >= n)) return;"]),
        ("guard", "if (i < n) x = 1;", ["if (true || (i < n)) x = 1;"]),
        ("guard", "a ? b : c", ["a || true ? b : c", "a && false ? b : c"]),
        ("type", "long long i = 1;", ["int i = 1;"]),
        ("type", "x = static_cast<std::uint32_t>(b);", ["x = static_cast<int>(b);"]),
        ("type", "const float x = 1;", ["const __half x = 1;"]),
    ],
)  # fmt: skip
def test_an_operator_edits_what_it_says(operator, text, results):
    assert edited(text, operator) == results


@pytest.mark.parametrize(
    "text",
    [
        "// a + 1 < b[2]",
        "/* if (a) return;\n   a + b */",
        '#include "a + 1"\n#define A 1 + \\\n    2 + 3',
        "static_assert(a + 1 < 2);",
        "__launch_bounds__(32 * 4)",
        'asm volatile("a + 1" : "+f"(d[0]));',
        "#ifdef __CUDACC__\nx = a + 1;\n#else\n#endif",
        "#ifndef __CUDACC__\n#else\nx = a + 1;\n#endif",
        "#ifdef __CUDACC__\n#else\nx = a + 1;\n#endif",
        "#ifndef __CUDACC__\nx = a + 1;\n#endif",
    ],
)
def test_what_is_no_code_of_this_device_is_left_alone(text):
    assert [edited(text, operator) for operator in OPERATORS] == [[]] * len(OPERATORS)
    assert len(mask(text, cuda=False)) == len(text)


def test_the_other_branch_is_this_devices_on_a_gpu():
    text = "#ifdef __CUDACC__\na + b;\n#else\na * b;\n#endif\nc;\n#if N\nd;\n#else\ne;\n#endif"
    assert mask(text, cuda=True).split() == ["a", "+", "b;", "c;", "d;"]
    assert mask(text, cuda=False).split() == ["c;", "d;"]
    text = "#ifndef __CUDACC__\na + b;\n#else\na * b;\n#endif"
    assert mask(text, cuda=True).split() == ["a", "*", "b;"]


def test_all_kernels_are_mutated_and_the_host_is_not():
    found = generate(shipped())
    files = {name for name, _ in shipped().files if name.endswith((".cu", ".cuh"))}
    nothing_to_slip_on = {"async.cuh", "matrix.cuh", "out_of_line.cuh", "stream.cuh", "tensor_map.cuh"}
    assert {mutant.file for mutant in found} == files - nothing_to_slip_on
    assert {mutant.operator for mutant in found} == set(OPERATORS)
    assert len(set(found)) == len(found) > 3000
    for mutant in found[::50]:
        assert mutant.before(shipped()) != mutant.after(shipped())
        assert mutant.before(shipped()) in shipped().text(mutant.file).split("\n", mutant.line(shipped()) - 1)[-1]
    assert generate(shipped(), file="quantize.cu") == tuple(m for m in found if m.file == "quantize.cu")
    with pytest.raises(UserError, match=r"no kernel file 'host/runtime\.cpp' to mutate; there are "):
        generate(shipped(), file="host/runtime.cpp")


def test_a_sample_is_spread_and_repeats():
    found = generate(shipped())
    chosen = sample(found, 60, 7)
    assert chosen == sample(found, 60, 7) != sample(found, 60, 8)
    assert len(set(chosen)) == 60
    assert max(Counter((mutant.file, mutant.operator) for mutant in chosen).values()) == 1
    assert sample(found[:5], 60, 1) == found[:5]


def test_a_file_reaches_what_launches_from_it():
    assert shipped().included("moe.cu") == {"moe.cu", "convert.cuh", "math.cuh", "stream.cuh", "warp.cuh"}
    assert set(units(shipped(), "warp.cuh")) == {
        *("attention.cu", "attention_many.cu", "attention_wide.cu", "dense_wide.cu", "gemm.cu", *GATED),
        *("kv_cache.cu", "lm_head.cu", "moe.cu", "norm.cu", "quantize.cu"),
    }
    assert launches("moe_forward", "host") == {"moe.cu", "gemm.cu", *GATED, "ffn.cu"}
    assert launches("quantize", "host") == {"quantize.cu"}
    assert launches("gemm", "host") == {"gemm.cu", *GATED}  # by cases that name a path
    assert launches("gemm_persistent", "host") == {"dequant.cu", "dense_wide.cu", "gemm.cu"}


CODES = "const int count = min(COUNT, left);"
CODES_TYPE = "using Codes = typename Word<group / 2>::Type;"


@pytest.mark.parametrize(
    ("old", "new", "verdict", "detector"),
    [
        ("[at / OF_BLOCK]", "[at / (2 * OF_BLOCK)]", "killed", "exact"),
        (CODES, CODES.replace("min(COUNT, left)", "COUNT"), "killed", "memory"),
        (CODES_TYPE, CODES_TYPE + "\n    if (threadIdx.x == 0) return;\n    __syncthreads();", "killed", "crash"),
        (CODES_TYPE, CODES_TYPE + "\n    *static_cast<volatile int*>(nullptr) = 0;", "killed", "memory"),
        ("// Dequantise MXFP4", "// Decode MXFP4", "equivalent", ""),
        ("all = R * groups;", "all = static_cast<int>(R) * groups;", "survived", ""),
        ("all = R * groups;", "all = R * rows;", "does not compile", ""),
    ],
)
def test_one_change_is_judged(old, new, verdict, detector):
    tried = try_change("dequant.cu", old, new, "host", "dequant")
    assert (tried.verdict, tried.detector) == (verdict, detector)
    assert bool(tried.message) == (verdict in ("killed", "does not compile"))


def test_a_change_of_a_text_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"occurs 0 times in kernels/dequant\.cu"):
        try_change("dequant.cu", "no such text", "", "host")
    with pytest.raises(UserError, match=r"no kernel file 'nothing\.cu'"):
        try_change("nothing.cu", "a", "b", "host")
    with pytest.raises(UserError, match="no operator 'nothing'"):
        try_change("dequant.cu", CODES, "", "host", "nothing")


def test_results_are_kept_and_not_made_twice(tmp_path, monkeypatch):
    out = tmp_path / "mutants.jsonl"
    chosen = sample(generate(shipped(), file="elementary.cu"), 3, 0)
    first = run_mutants(chosen, "host", 1, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == [result.tried.verdict for result in first]
    assert {row["file"] for row in rows} == {"elementary.cu"}
    seen = []
    monkeypatch.setattr(mutation, "spread", lambda _f, tasks, *_: seen.extend(tasks) or [])
    left = [m for m, result in zip(chosen, first, strict=True) if result.tried.verdict not in ("killed", "equivalent")]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows if row["verdict"] in ("killed", "equivalent")))
    kept = [mutant for mutant in chosen if mutant not in left]
    assert [result.mutant for result in run_mutants(kept, "host", 1, out)] == kept
    assert seen == []
    out.write_text("no json")
    with pytest.raises(UserError, match="is no result of `mxharness mutants`"):
        run_mutants(chosen, "host", 1, out)


def test_the_score_leaves_out_what_cannot_be_seen():
    mutant = Mutant("dequant.cu", 0, 1, "constant", "x")
    verdicts = ["killed", "killed", "killed", "survived", "equivalent", "listed", "does not compile"]
    results = [mutation.MutantResult(mutant, 1, "", "", Tried(verdict)) for verdict in verdicts]
    assert score(results) == 0.75
    assert score([]) == 1


def test_every_reason_is_about_a_mutant_that_exists():
    files = {reason.file for reason in reasons()} - {"*"}
    found = {file: [m for name in ("host", "cuda") for m in generate(shipped(), name, file)] for file in files}
    for reason in reasons():
        mutants = generate(shipped()) if reason.file == "*" else found[reason.file]
        assert any(reason.holds_for(mutant, shipped()) for mutant in mutants), reason
        assert len(reason.reason) > 20


def test_an_edit_is_of_one_place():
    sources = Sources((("a.cu", "abcdef"), ("b.cu", "abcdef"))).edited("a.cu", 2, 4, "XYZ")
    assert sources.files == (("a.cu", "abXYZef"), ("b.cu", "abcdef"))


def test_silence_is_no_evidence(monkeypatch):
    mutant = generate(shipped(), file="rope.cuh")[0]
    for lost, verdict in (
        (Lost("no answer within 9 s", hung=True), "survived"),
        (Lost("killed by SIGSEGV"), "killed"),
    ):
        monkeypatch.setattr(mutation, "spread", lambda *_, lost=lost: [((mutant, "host"), lost)])
        (result,) = run_mutants([mutant])
        assert (result.tried.verdict, result.tried.message) == (verdict, str(lost))


@pytest.mark.parametrize(("hung", "found"), [(True, None), (False, "race")])
def test_a_checked_run_that_takes_too_long_is_no_evidence(monkeypatch, hung, found):
    cases = [(op, op.cases[0]) for op in select("rms_norm")]
    host = open_device("host")

    def checked(op, case, device, inputs):
        done = execute(op, case, device, inputs)
        return replace(done, outputs={}, violations=("told",), hung=hung) if device.settings.checks else done

    monkeypatch.setattr(detectors, "execute", checked)
    finding = detectors.search(cases, host, ("race",)).finding
    assert (finding and finding.detector) == found
