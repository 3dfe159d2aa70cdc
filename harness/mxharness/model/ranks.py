"""Several processes, one for each GPU, that share a measurement: torch.distributed as torchrun starts it.

Batches of windows are dealt out in turn and gathered through the CPU, bits and all, so that a result has the same
bits on any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxharness.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Ranks:
    """This process among all that share a measurement."""

    rank: int = 0
    count: int = 1

    def mine(self, number: int) -> bool:
        """Whether batch `number` is this process's."""
        return number % self.count == self.rank

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def gathered(self, values: Floats) -> Floats:
        """The sum of bits over processes, each of which has zeros where it has nothing: everybody's values."""
        if self.count == 1:
            return values
        import numpy as np
        import torch.distributed

        bits = torch.from_numpy(values.view(np.int32).copy())
        torch.distributed.all_reduce(bits)
        return bits.numpy().view(np.float32)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. Enter before anything touches a GPU.

    Each process sees one GPU, the one of its local rank. Raises UserError where CUDA_VISIBLE_DEVICES names too few.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and local >= len(named.split(",")):
        raise UserError(f"{count} processes and CUDA_VISIBLE_DEVICES={named}: each needs a GPU of its own")
    os.environ["CUDA_VISIBLE_DEVICES"] = named.split(",")[local] if named else str(local)
    import torch.distributed

    torch.distributed.init_process_group("gloo")  # a few bytes a window: no need for NCCL
    try:
        yield Ranks(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
