"""What a failing check says about the place of a fault: rules over places, what stands there instead, where along K."""

from __future__ import annotations

import pytest
import torch
from mxharness import functional, places
from mxharness.device import open_device
from mxharness.device.source import shipped
from mxharness.execution import execute
from mxharness.judge import judge, localise, values
from mxharness.op import Case, Operand
from mxharness.ops import find
from mxharness.pattern import along, describe


def failing(shape, *where):
    """A bool tensor, true at `where`."""
    bad = torch.zeros(shape, dtype=torch.bool)
    bad[where] = True
    return bad


# Rules over places


@pytest.mark.parametrize(
    ("place", "phrase"),
    [
        ((slice(8, None), slice(32, 64)), "the last 2 rows (the tail of tiles of 8), in columns 32 to 63"),
        ((3, slice(1, None, 2)), "row 3 alone, in every odd column"),
        ((slice(None), 149), "the last column (149)"),
        ((slice(2, 7), slice(None)), "rows 2 to 6"),
        ((slice(None), slice(0, 70)), "columns up to 69"),
        (([0, 1, 2, 4, 5, 6, 7, 8, 9],), "every row but 3"),
        ((slice(None), [3, 50, 51]), "columns 3, 50, 51"),
    ],
)
def test_the_plainest_of_the_narrowest_rules_is_named(place, phrase):
    assert describe(failing((10, 150), *place)) == phrase


def test_what_has_no_rule_is_scattered_and_what_nearly_fails_everywhere_is_said_so():
    random = torch.Generator().manual_seed(1)
    assert describe(torch.rand(10, 150, generator=random) < 0.3) == "scattered"
    assert describe(torch.rand(10, 150, generator=random) < 0.95) == "nearly every element (95%)"
    sparse = failing((10, 150), [1, 5, 4], [20, 91, 140])
    assert describe(sparse) == "scattered; the narrowest rule that holds them all is rows 1 to 5"


def test_a_rule_may_hold_healthy_elements_but_never_leaves_a_failing_one_out():
    bad = failing((10, 64), slice(None), slice(32, None))
    bad[::3, ::2] = False
    assert describe(bad) == "the last 32 columns (the tail of tiles of 32)"
    bad[0, 1] = True
    assert "the last 32" not in describe(bad)


def test_experts_heads_and_lanes_are_places_of_their_own():
    expert = torch.tensor([[2, 0], [1, 2], [3, 1]])
    bad = (expert == 2).unsqueeze(-1).expand(3, 2, 8)
    found = {**along(bad.shape, "token", "slot", "feature"), "expert": expert.unsqueeze(-1)}
    assert describe(bad, found) == "expert 2 alone"
    y = torch.zeros(2, 3, 6, 32)
    assert describe(failing(y.shape, slice(None), slice(None), [1, 3, 5]), places.heads(y, 3, torch.zeros(2))) == (
        "head of its group 1 alone"
    )
    y = torch.zeros(16, 64)
    lane = places.lane(torch.arange(16).unsqueeze(-1), torch.arange(64))
    assert describe(lane == 9, places.product(y, "row")) == "lane 9 alone"
    assert int(lane[3, 2]) == 9  # d[0], d[1] of a warp: row g = lane / 4, columns 2 (lane % 4) and one more


def test_a_number_below_zero_is_no_place():
    token = torch.tensor([[-1, 0, 1, -1]])
    assert describe(failing((1, 4), 0, 2), {"token": token}) == "token 1 alone"
    assert describe(failing((1, 4), 0, 3), {"token": token}) == "one element"


def test_every_place_fits_its_output(op):
    device = open_device("host")
    for case in (op.cases[0], op.cases[len(op.cases) // 2]):
        inputs = op.make_inputs(case)
        outputs = execute(op, case, device, inputs).outputs
        known = op.places(case, {**outputs, **inputs}) if op.places else {}
        for name in set(known) & set(outputs):
            for place in known[name].values():
                assert torch.broadcast_shapes(place.shape, outputs[name].shape) == outputs[name].shape
        for name, operand in (op.operands(case) if op.operands else {}).items():
            assert operand.name in inputs or name not in outputs


# What stands there instead


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda want: want * 0, "they are 0"),
        (lambda want: want * 4, "they are 4 times what they should be"),
        (lambda want: want * 1.7, "they are 1.7 times what they should be"),
        (lambda want: -want, "the sign is wrong"),
        (lambda want: want.roll(-1, 0), "they hold what the next row should"),
        (lambda want: want.roll(1, 1), "they hold what the previous feature should"),
        (lambda want: want[:, torch.arange(64) ^ 1], "neighbours (even and odd feature) are exchanged"),
        (lambda want: want.T.reshape(want.shape), "the result is transposed"),
        (lambda want: want + torch.randn(want.shape), ""),
        (lambda want: want * (1 + 2.0**-20), ""),
    ],
)
def test_what_stands_there_instead_is_named(change, phrase):
    torch.manual_seed(0)
    want = torch.randn(6, 64, dtype=torch.float64)
    got = change(want).float()
    bad = torch.ones(want.shape, dtype=torch.bool)
    assert values.describe(got, want, bad, along(want.shape, "row", "feature")) == phrase


def test_an_offset_of_integers_is_named():
    want = torch.tensor([3, 5, 7, 9], dtype=torch.float64)
    bad = torch.ones(4, dtype=torch.bool)
    assert values.describe(torch.tensor([4, 6, 8, 10]), want, bad) == "they are 1 too large"
    assert values.describe(torch.tensor([3, 5, 7, 8]), want, want == 9) == ""


# Along K


def trial(wrong, K=288, dtype=torch.float32):
    """A trial whose output is wrong where `wrong` says so of the k that are left, counting its launches."""
    operand = torch.ones(4, K) if dtype == torch.float32 else torch.full((4, K // 2), 0x22, dtype=torch.uint8)
    launches = []

    def fails(part):
        launches.append(part)
        left = part[0] != 0 if dtype == torch.float32 else torch.stack((part[0] & 15, part[0] >> 4), -1).flatten() != 0
        return bool(wrong(torch.arange(K)[left]))

    return localise.Trial(operand, Operand("x"), fails), launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        (lambda k: (k >= 256).any(), "the last K block (8), k 256 to 287"),
        (lambda k: (k >= 32).any(), "K blocks from 1 on, k 32 to 287"),
        (lambda k: (k % 2 == 1).any(), "every odd nibble"),
        (lambda k: ((k % 2 == 1) & (k >= 256)).any(), "every odd nibble of the last K block (8), k 256 to 287"),
        (lambda k: (k % 16 >= 8).any(), "the second half of each step of 16"),
        (lambda k: (k // 32 % 2 == 0).any(), "every even K block, k 0 to 287"),
        (lambda k: len(k) > 0, ""),
        (lambda k: True, "with every product zero, too, so not in the products"),
        (lambda k: len(k) > 64, "no K block alone, but K blocks 0 to 2 together, so the way their sums are joined"),
    ],
)
def test_the_part_of_k_is_named(wrong, phrase, dtype):
    asked, launches = trial(wrong, dtype=dtype)
    assert localise.along_k(asked) == phrase
    assert len(launches) <= 1 + localise.GROUPS + 4


def test_a_long_k_takes_a_bounded_number_of_launches():
    asked, launches = trial(lambda k: (k == 2000).any(), K=2880)
    assert localise.along_k(asked) == "every even nibble of K block 62 alone, k 1984 to 2015"
    assert len(launches) <= 1 + 2 * localise.GROUPS + 4


def test_the_first_step_is_where_the_result_turns_wrong():
    asked, launches = trial(lambda k: len(k) > 150)
    assert localise.first_step(asked) == "the first K step that explains it is 9, k 144 to 159"
    assert len(launches) <= 6


def message(file, old, new, case, gate="bound", op="gemm"):
    """What the judge says of a kernel with a change."""
    operator, device = find(op), open_device("host", sources=shipped().replaced(file, old, new))
    inputs = operator.make_inputs(case)
    return judge(operator, case, gate, "host", inputs, execute(operator, case, device, inputs), device).message


def test_the_kernel_itself_is_asked_where_along_k_it_goes_wrong():
    case = Case("gemm", (8, 64, 288), options=("fp32",))
    text = "        words[i][0] = codes[i].x;"
    mask = "        for (auto* word : {&codes[i].x, &codes[i].y, &codes[i].z, &codes[i].w}) *word &= 0x0f0f0f0fu;\n"
    said = message("gemm_few.cuh", text, mask + text, case)
    assert "pattern: every element, every odd nibble; paste" in said
    said = message("gemm_few.cuh", text, "        if (k >= 256)\n" + mask + text, case)
    assert "pattern: every element, every odd nibble of the last K block (8), k 256 to 287; paste" in said


def test_an_other_order_is_named_by_the_step_that_shows_it():
    case = Case("gemm", (8, 64, 288), options=("fp32",))
    said = message(
        "mma.cuh", "static constexpr int chunk = 128;", "static constexpr int chunk = 64;", case, "predicted"
    )
    assert "no K block alone" in said
    assert "the first K step that explains it is " in said


def test_a_healthy_kernel_and_one_without_a_device_are_not_run_again(monkeypatch):
    op, case = find("gemm"), Case("gemm", (5, 40, 96), options=("fp32",))
    inputs = op.make_inputs(case)
    device = open_device("host")
    execution = execute(op, case, device, inputs)
    monkeypatch.setattr(functional, "gemm", None)  # whoever launches now fails
    assert judge(op, case, "bound", "host", inputs, execution, device).passed
    execution.outputs["y"][0, 0] = 100.0
    assert "pattern: one element; paste" in judge(op, case, "bound", "host", inputs, execution).message
    with pytest.raises(TypeError):
        judge(op, case, "bound", "host", inputs, execution, device)
