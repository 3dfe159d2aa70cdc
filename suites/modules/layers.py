"""What tests of modules share: bits compared, a model to replace layers of, and the same on its decoded weights."""

from __future__ import annotations

import copy
import io

import torch
from mxharness import mxfp4
from mxharness.nn import MXFP4Embedding, MXFP4Linear

HALVES = (torch.bfloat16, torch.float16)


def same_bits(a, b):
    """Equal in shape, dtype and every byte: a NaN equals itself, zeros of two signs differ."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def same_state(a, b):
    """Whether two modules have the same names in their states, and the same bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def through_torch(state, folder):
    """A state as torch saves and loads it; in memory, so that the folder stays empty."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def decoded(module):
    """A float32 copy of a model with torch layers on the decoded weights."""
    module = copy.deepcopy(module)
    for name, old in list(module.named_modules(remove_duplicate=False)):
        if isinstance(old, MXFP4Linear):
            new = torch.nn.Linear(old.in_features, old.out_features, old.bias is not None, device=old.codes.device)
            if old.bias is not None:
                new.bias.data = old.bias
        elif isinstance(old, MXFP4Embedding):
            new = torch.nn.Embedding(old.num_embeddings, old.embedding_dim, device=old.codes.device)
        else:
            continue
        new.weight.data = mxfp4.dequantize(*old.packed)[:, : old.columns].contiguous()
        module.set_submodule(name, new)
    return module


class Tied(torch.nn.Module):
    """Token table and head with one weight, a layer in two places, and what must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, 45)
        self.layers = torch.nn.Sequential(torch.nn.Linear(45, 64), torch.nn.SiLU(), torch.nn.Linear(64, 45))
        self.norm = torch.nn.LayerNorm(45)
        self.again = self.layers[0]
        self.head = torch.nn.Linear(45, 23, bias=False)
        self.head.weight = self.embed.weight
        self.router = torch.nn.Parameter(torch.randn(4, 45).half().float())  # survives half()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, ids):
        """Logits (.., 23) of ids (..)."""
        h = self.embed(ids)
        h = self.norm(h + self.layers(h) + self.layers[2](self.again(h)))
        return self.head(self.dropout(h))
