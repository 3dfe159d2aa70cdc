"""What the assembler makes of warpgroup products: nothing is written to registers that the tensor core still reads.

The tensor core reads the rows of such a product from registers when it comes to them, up to the wait that covers it.
The assembler takes these registers for free as soon as the product has begun; it has been seen to write other values to
them, where one call of some hundred had rows of other bits. `keep_until_here` of wgmma.cuh keeps it from that, which
holds for one compiler and one text at a time: so it is looked up here, on every path from every product to its wait.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from mxharness.device import cuda, toolchain
from mxharness.device.source import shipped

FILES = ["attention_wide.cu", "gemm_thin_bf16.cu", "gemm_wide_bf16.cu", "gemm_wide_fp16.cu"]
PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")  # with rows in four registers from this one on
WAIT = re.compile(r"DEPBAR\.LE gsb0, 0x(\d+)")
READS = re.compile(r"(HGMMA|ST|RED|BRA|BAR|SYNCS|WARPGROUP|MEMBAR|LDGSTS|LDGDEPBAR|DEPBAR|[IF]SETP|PLOP)")
"""Instructions whose first register is read, or that have none."""
COMMITTED = "gsb0"
MOST_GROUPS = 4
"""Groups of products begun after one, at most, until it is waited for."""


@dataclass(frozen=True)
class Kernel:
    """Instructions in order, and the number of the one that follows each label."""

    name: str
    code: list[str]
    labels: dict[str, int]


def nvdisasm() -> str | None:
    """Path of NVIDIA's disassembler: beside nvcc, on the PATH, or of the wheel nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) / "cu13" / "bin" for place in (spec.submodule_search_locations or ())] if spec else []
    beside = [Path(tool).resolve().parent] if (tool := toolchain.nvcc()) else []
    return next((found for place in (*beside, None, *wheels) if (found := shutil.which("nvdisasm", path=place))), None)


def kernels(text: str) -> list[Kernel]:
    """Of what nvdisasm prints of a cubin."""
    found = []
    for part in text.split("\n.text.")[1:]:
        kernel = Kernel(part.partition(":")[0], [], {})
        for line in part.partition("\n\t.section")[0].splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                kernel.labels[label[1]] = len(kernel.code)
            if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
                kernel.code.append(instruction[1])
        found.append(kernel)
    return found


def written(instruction: str) -> set[int]:
    """Numbers of the registers that an instruction writes."""
    operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    first = re.match(r"\s*R(\d+)\b", operands)
    if first is None or READS.match(operation):
        return set()
    wide = 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation or operation == "CS2R" else 1
    return set(range(int(first[1]), int(first[1]) + wide))


def early_writes(kernel: Kernel) -> tuple[int, set[str]]:
    """How many products have rows in registers, and what is written to these before the wait that covers a product.

    AssertionError where a path ends without such a wait.
    """
    products = [at for at, instruction in enumerate(kernel.code) if PRODUCT.search(instruction)]
    wrong = set()
    for product in products:
        first = int(PRODUCT.search(kernel.code[product])[1])
        rows, seen, paths = set(range(first, first + 4)), set(), [(product, -1)]
        while paths:
            at, after = paths.pop()  # after: groups of products that were ended after this one's; -1: nor was its own
            while (at, after) not in seen:
                seen.add((at, after))
                instruction = kernel.code[at]
                after += "HGMMA" in instruction and COMMITTED in instruction
                if (wait := WAIT.search(instruction)) and after >= int(wait[1]):
                    break
                if written(instruction) & rows:
                    wrong.add(f"{kernel.name}: '{instruction}' before the wait for '{kernel.code[product]}'")
                lost = after > MOST_GROUPS or instruction.startswith("EXIT")
                assert not lost, f"{kernel.name}: nobody waits for '{kernel.code[product]}'"
                if branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction):
                    paths.append((kernel.labels[branch[1]], after))
                    if not instruction.startswith("@"):
                        break
                at += 1
    return len(products), wrong


@pytest.mark.parametrize("source", FILES)
def test_rows_of_a_product_stay_in_their_registers_until_it_is_done(source):
    tool = nvdisasm()
    if toolchain.nvcc() is None or tool is None:
        pytest.skip(f"no nvcc or no nvdisasm: the machine code of {source} was not looked at")
    cubin = cuda.compile_cubin(shipped(), source, "sm_90a")
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True, timeout=60).stdout
    looked = {kernel.name: early_writes(kernel) for kernel in kernels(text)}
    assert [sorted(wrong) for _, wrong in looked.values() if wrong] == []
    assert {name for name, (products, _) in looked.items() if products} == {
        name
        for name in shipped().kernels(source)
        if "thin" not in source or "64x64" in name  # the others have steps of a warp
    }


LOOP = """
.text.kernel:
.L_x_1:
        /*0000*/ LOP3.LUT R8, R4, R5, RZ, 0xfc, !PT ;
        /*0010*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/ {} ;
        /*0030*/ @P0 BRA `(.L_x_2) ;
        /*0040*/ WARPGROUP.DEPBAR.LE gsb0, {} ;
        /*0050*/ {} ;
        /*0060*/ BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/ {} ;
        /*0080*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/ EXIT ;
\t.section
"""
NOTHING = "NOP"


@pytest.mark.parametrize(
    ("one", "pending", "waited", "branch", "wrong"),
    [
        (NOTHING, "0x0", NOTHING, NOTHING, False),
        ("FADD R12, R8, R9", "0x0", "MOV R8, RZ", "STS.128 [R8], R12", False),
        ("FADD R11, R2, R3", "0x0", NOTHING, NOTHING, True),
        ("@P1 LDS.128 R8, [R2]", "0x0", NOTHING, NOTHING, True),
        ("CS2R R10, SRZ", "0x0", NOTHING, NOTHING, True),
        (NOTHING, "0x0", NOTHING, "MUFU.EX2 R9, R2", True),
        (NOTHING, "0x1", "MOV R8, RZ", NOTHING, True),  # a wait that leaves this one under way
    ],
)
def test_a_write_before_the_wait_is_found(one, pending, waited, branch, wrong):
    (kernel,) = kernels(LOOP.format(one, pending, waited, branch))
    products, found = early_writes(kernel)
    assert (products, bool(found)) == (1, wrong)
