"""A GPU that is not there: tensors that say they are on one, and refuse to meet those of the CPU, as a GPU's do.

Sums of products are taken in another order, and functions of a number are a unit in the last place away.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

GPU = torch.device("cuda", 0)
READS = {"numpy", "__array__"}
PRODUCTS = {"matmul", "__matmul__"}
FUNCTIONS = {"exp", "expm1", "log2", "rsqrt", "sigmoid", "special_erf", "tanh"}


class Away(torch.Tensor):
    """What is on the GPU that is not there."""


def _moved(tensor, where):
    where = torch.device(where) if isinstance(where, str) else where
    plain = tensor.as_subclass(torch.Tensor)
    return plain.as_subclass(Away) if where.type == "cuda" else plain


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None) -> object:
        kwargs = dict(kwargs or {})
        name = function.__name__
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        away = [one for one in tensors if isinstance(one, Away)]
        if function == torch.Tensor.device.__get__:
            return GPU if away else function(*args)
        if name in READS and away:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        targets = [one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device)]
        if targets and targets[0].type == "cuda":
            if tensors:  # .to(device)
                return _moved(tensors[0], GPU)
            return function(*args, **kwargs | {"device": "cpu"}).as_subclass(Away)
        if away and (name == "cpu" or targets):
            return _moved(away[0], "cpu")
        if away and any(not isinstance(one, Away) and one.ndim for one in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")
        with torch._C.DisableTorchFunctionSubclass():
            if away and name in PRODUCTS:
                args = args[0].flip(-1), args[1].flip(-2)
            found = function(*args, **kwargs)
            if away and name in FUNCTIONS:
                found = found * (1 + 2.0**-52)
        if not away:
            return found
        flat, spec = tree_flatten(found)
        return spec.unflatten([_moved(one, GPU) if isinstance(one, torch.Tensor) else one for one in flat])


@contextmanager
def gpu():
    """Inside, GPU is a device like any other."""
    with _Mode():
        yield GPU
