"""`torch.nn.Embedding` with an MXFP4 table."""

from __future__ import annotations

from typing import Self

import torch

from mxharness import functional
from mxharness.errors import UserError
from mxharness.functional.common import check_pair, check_tensor, integer
from mxharness.mxfp4 import Quantized
from mxharness.nn.packed import PackedModule, check_place, check_sizes, pack


class MXFP4Embedding(PackedModule):
    """Rows (.., embedding_dim) of the table by ids (..) int32 or int64, exact, rounded once to the module's dtype.

    Buffers: codes (V, Kp/2) and scales (V, Kp/32) uint8. A new module has `torch.nn.Embedding`'s random table, rounded
    by scale_rule and tie_rule; dtype is its dtype before that and that of the rows, and follows casts of the module.
    padding_idx is as in torch: the row of a new module is zero, and a given table keeps the row it has. Raises
    UserError for sizes that are not positive; forward, for ids of another dtype and ids outside the vocabulary.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_rule: str = "floor",
        tie_rule: str = "even",
    ) -> None:
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_place(device, dtype)
        row = _padding_row(padding_idx, num_embeddings)
        fresh = torch.nn.Embedding(num_embeddings, embedding_dim, row, device=device, dtype=dtype)
        super().__init__(pack(fresh.weight.detach(), scale_rule, tie_rule), embedding_dim, fresh.weight.dtype)
        self.padding_idx = row

    @classmethod
    def from_embedding(
        cls, embedding: torch.nn.Embedding, *, scale_rule: str = "floor", tie_rule: str = "even"
    ) -> Self:
        """A module with the table of `embedding` (which stays as it is) in MXFP4.

        Raises UserError for another type, for max_norm (it rewrites rows as they are read), and for NaN or Inf.
        """
        if not isinstance(embedding, torch.nn.Embedding):
            raise UserError(f"from_embedding takes a torch.nn.Embedding, not {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise UserError("an embedding with max_norm rewrites its table as it is read; MXFP4 tables are constant")
        return cls.from_quantized(
            pack(embedding.weight.detach(), scale_rule, tie_rule),
            embedding_dim=embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            dtype=embedding.weight.dtype,
        )

    @classmethod
    def from_quantized(
        cls,
        table: Quantized,
        *,
        embedding_dim: int | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A module that holds these codes (V, K/2) and scales (V, K/32), not copies; embedding_dim defaults to K.

        Raises UserError for tensors that do not belong together.
        """
        table = check_pair(table, "table")
        if table[0].ndim != 2:
            raise UserError(f"an embedding's codes are (V, K/2), not {tuple(table[0].shape)}")
        self = cls.__new__(cls)
        columns = table[0].shape[1] * 2 if embedding_dim is None else embedding_dim
        PackedModule.__init__(self, table, columns, dtype)
        self.padding_idx = _padding_row(padding_idx, table[0].shape[0])
        return self

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.codes.shape[0]

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self.columns

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (.., embedding_dim) of ids (..); no ids give no rows."""
        check_tensor(ids, "ids")
        if ids.dtype not in (torch.int32, torch.int64):
            raise UserError(f"ids must be int32 or int64, not {ids.dtype}")
        if ids.numel() == 0:
            return torch.empty((*ids.shape, self.columns), dtype=self.dtype, device=self.codes.device)
        flat = ids.reshape(-1).contiguous()
        rows = functional.embedding_lookup(flat, self.packed, dtype=self.dtype, K=self.columns)
        return rows.view(*ids.shape, self.columns)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"


def _padding_row(padding_idx: int | None, V: int) -> int | None:
    """Padding_idx counted from the front. UserError where there is no such row."""
    if padding_idx is None:
        return None
    padding_idx = integer(padding_idx, "padding_idx")
    if not -V <= padding_idx < V:
        raise UserError(f"padding_idx is {padding_idx}, the table has {V} rows")
    return padding_idx % V
