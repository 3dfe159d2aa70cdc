"""Every consumer of MXFP4 weights as a function: torch tensors in and out, on the CPU or a GPU, by the same kernels.

A weight is `mxfp4.Quantized(codes, scales)`: codes (N, K/2) uint8, low nibble first, and scales (N, K/32) uint8.
Where the tensors lie decides where the kernels run: on the CPU through the host device, on a GPU through PyCUDA, with
the same bits. Keyword `device` names another device. Functions check everything before they launch and raise UserError,
in one sentence, for what they do not take. They are for inference: no gradient flows through them.
"""

from mxharness.functional.common import ACTIVATIONS
from mxharness.functional.embedding import (
    EmbeddingCache,
    add_position_embeddings,
    embedding_cache,
    embedding_lookup,
    embedding_lookup_batch,
    embedding_lookup_cached,
)
from mxharness.functional.gemm import (
    PersistentWeight,
    dense,
    gemm,
    gemm_batch,
    gemm_bias,
    gemm_persistent,
    persistent,
)
from mxharness.functional.norm import layer_norm, rms_norm
from mxharness.functional.quantize import dequantize, quantize

__all__ = [
    "ACTIVATIONS",
    "EmbeddingCache",
    "PersistentWeight",
    "add_position_embeddings",
    "dense",
    "dequantize",
    "embedding_cache",
    "embedding_lookup",
    "embedding_lookup_batch",
    "embedding_lookup_cached",
    "gemm",
    "gemm_batch",
    "gemm_bias",
    "gemm_persistent",
    "layer_norm",
    "persistent",
    "quantize",
    "rms_norm",
]
