"""Asynchronous copies and products on the host device: as late as a GPU may make them, and never forgotten."""

from __future__ import annotations

import pytest
import torch
from mxharness.device import host
from mxharness.device.source import Sources, shipped
from mxharness.errors import KernelFailure

POISON = -1
KERNELS = """
#include "async.cuh"
#include "wgmma.cuh"
extern "C" __global__ void late(int* in, int* out) {
    __shared__ int words[32];
    const int i = threadIdx.x;
    words[i] = 5;
    copy_async<4>(words + i, in + i, true);
    commit_async();
    out[i] = words[i];
    in[i] += 100;
    wait_async<0>();
    out[32 + i] = words[i];
}
extern "C" __global__ void groups(const int* in, int* out) {
    __shared__ uint2 places[5];
    for (int i = 0; i < 3; ++i) {
        copy_async<8>(places + i, in + 2 * i, i != 1);
        commit_async();
    }
    copy_async<8>(places + 3, in + 6, true);
    const auto note = [&](int at) {
        for (int i = 0; i < 4; ++i) out[at + i] = places[i].x;
    };
    wait_async<1>();
    note(0);
    commit_async();
    commit_async();
    wait_async<2>();
    note(4);
    wait_async<1>();
    note(8);
    copy_async<8>(places + 4, in, true);
    wait_async<0>();
    out[12] = places[4].x;
    commit_async();
    wait_async<0>();
    out[13] = places[4].x;
}
extern "C" __global__ void forgotten(const int* in, int) {
    __shared__ int words[32];
    copy_async<4>(words + threadIdx.x, in + threadIdx.x, true);
    if (threadIdx.x == 3) return;
    commit_async();
    wait_async<0>();
}
extern "C" __global__ void misplaced(const int* in, int from, int to) {
    __shared__ uint4 places[2];
    copy_async<16>(reinterpret_cast<int*>(places) + to, in + from, true);
    commit_async();
    wait_async<0>();
}
extern "C" __global__ void many(const int* in, int* out) {
    __shared__ int words[300];
    for (int i = 0; i < 300; ++i) copy_async<4>(words + i, in, true);
    for (int i = 0; i < 300; ++i) out[i] = words[i];
    commit_async();
    wait_async<0>();
}
extern "C" __global__ void products(float* out, int waits) {
    __shared__ __align__(1024) std::uint32_t ones[64][32];
    for (int i = threadIdx.x; i < 64 * 32; i += 128) ones[i / 32][i % 32] = 0x3f803f80;
    __syncthreads();
    std::uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}, other[4] = {};
    float d[8][4], rest[8][4];
    for (int i = 0; i < 32; ++i) d[i / 4][i % 4] = rest[i / 4][i % 4] = 7;
    const auto note = [&](int at) {
        out[128 * at + threadIdx.x] = d[3][2];
        out[128 * (at + 1) + threadIdx.x] = rest[3][2];
    };
    group_step<__nv_bfloat16, 8>(d, a, ones, 0, true, 64);
    group_step<__nv_bfloat16, 8>(d, a, ones, 3, false, 64);
    group_commit();
    note(0);
    for (int i = 0; i < 4; ++i) other[i] = a[i] = 0x40004000;
    group_step<__nv_bfloat16, 8>(rest, other, ones, 1, false, 64);
    group_commit();
    if (waits == 0) return;
    group_wait<1>(d);
    note(2);
    group_wait<0>(rest);
    note(4);
}
"""


@pytest.fixture(scope="module")
def cpu():
    return host.open_device(Sources((*shipped().files, ("copies.cu", KERNELS)))).configured(poison=0xFF)


@pytest.fixture
def numbers():
    return torch.arange(1, 65, dtype=torch.int32), torch.zeros(300, dtype=torch.int32)


def test_a_copy_is_made_by_the_wait_from_what_is_there_then(cpu, numbers):
    source, out = numbers
    cpu.launch("copies.cu", "late", (1,), (32,), source, out)
    assert out[:32].tolist() == [POISON] * 32
    assert out[32:64].tolist() == list(range(101, 133))


def test_without_poison_a_copy_is_made_at_once(cpu, numbers):
    source, out = numbers
    cpu.configured(poison=None).launch("copies.cu", "late", (1,), (32,), source, out)
    assert out[:64].tolist() == [*range(1, 33)] * 2


def test_a_wait_leaves_the_newest_groups_and_what_is_in_none(cpu, numbers):
    cpu.launch("copies.cu", "groups", (1,), (1,), *numbers)
    out = numbers[1].tolist()
    assert out[0:4] == [1, 0, POISON, POISON]
    assert out[4:8] == [1, 0, 5, POISON]  # the last group is empty
    assert out[8:12] == [1, 0, 5, 7]
    assert out[12:14] == [POISON, 1]


def test_a_thread_that_does_not_wait_for_its_copies_is_named(cpu, numbers):
    sentence = r"thread \(3, 0, 0\) of block \(0, 0, 0\) ended with 1 asynchronous copies on their way"
    with pytest.raises(KernelFailure, match=sentence):
        cpu.launch("copies.cu", "forgotten", (1,), (32,), numbers[0], 0)
    cpu.launch("copies.cu", "late", (1,), (32,), *numbers)  # nothing is left of it
    assert numbers[1][32] == 101


@pytest.mark.parametrize("place", [(0, 1), (1, 0)])
def test_a_copy_from_or_to_an_address_that_is_no_multiple_of_its_size_is_named(cpu, numbers, place):
    cpu.launch("copies.cu", "misplaced", (1,), (1,), numbers[0], 0, 4)
    with pytest.raises(KernelFailure, match="accessed a vector of 16 bytes at an address that is no multiple of 16"):
        cpu.launch("copies.cu", "misplaced", (1,), (1,), numbers[0], *place)


def test_of_very_many_copies_the_oldest_are_made_early(cpu, numbers):
    cpu.launch("copies.cu", "many", (1,), (1,), *numbers)
    assert numbers[1].tolist() == [1] * 44 + [POISON] * 256


def test_a_warpgroups_product_is_made_by_the_wait_from_what_is_there_then(cpu):
    out = torch.zeros(6, 128)
    cpu.launch("copies.cu", "products", (1,), (128,), out, 1)
    assert torch.equal(out, torch.tensor([7.0, 7.0, 64.0, 7.0, 64.0, 39.0]).expand(128, 6).T)
    sentence = r"thread \(127, 0, 0\) of block \(0, 0, 0\) ended with 3 steps of its warpgroup's tensor core under way"
    with pytest.raises(KernelFailure, match=sentence):
        cpu.launch("copies.cu", "products", (1,), (128,), out, 0)
