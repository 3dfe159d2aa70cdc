"""Every consumer of MXFP4 weights as a function: torch tensors in and out, on the CPU or a GPU, by the same kernels.

A weight is `mxfp4.Quantized(codes, scales)`: codes (N, K/2) uint8, low nibble first, and scales (N, K/32) uint8. Where
the tensors lie decides where the kernels run: on the CPU through the host device, on a GPU through PyCUDA, with the
same bits. Keyword `device` is another Device, from `mxharness.device.open_device`. Functions check everything before
they launch and raise UserError, in one sentence, for what they do not take. They are for inference: no gradient flows
through them.
"""

from mxharness.functional.attention import (
    QKV,
    Projections,
    attention,
    attention_output_projection,
    fused_qkv_projection,
    grouped_query_attention,
    multi_head_attention,
    qkv_projection,
)
from mxharness.functional.common import ACTIVATIONS
from mxharness.functional.embedding import (
    EmbeddingCache,
    add_position_embeddings,
    embedding_cache,
    embedding_lookup,
    embedding_lookup_batch,
    embedding_lookup_cached,
)
from mxharness.functional.ffn import ffn_forward, ffn_forward_bias, ffn_residual, swiglu, swiglu_ffn_forward
from mxharness.functional.gemm import (
    PersistentWeight,
    dense,
    gemm,
    gemm_batch,
    gemm_bias,
    gemm_persistent,
    persistent,
)
from mxharness.functional.kv_cache import KVCache, kv_cache, kv_cache_append, kv_cache_read
from mxharness.functional.lm_head import (
    lm_head_forward,
    lm_head_forward_temperature,
    lm_head_forward_topk,
    lm_head_forward_topp,
    lm_head_greedy,
    lm_head_probabilities,
    lm_head_sample,
)
from mxharness.functional.memory import (
    Savings,
    attention_vram_savings,
    embedding_vram_savings,
    ffn_vram_savings,
    gemm_vram_savings,
    lm_head_vram_savings,
    moe_vram_savings,
    vram_savings,
)
from mxharness.functional.moe import moe_forward, moe_router
from mxharness.functional.norm import layer_norm, rms_norm
from mxharness.functional.profile import Profile, gemm_profile
from mxharness.functional.quantize import dequantize, quantize
from mxharness.functional.rope import Rope, Yarn, apply_rope, rope_table

__all__ = [
    "ACTIVATIONS",
    "QKV",
    "EmbeddingCache",
    "KVCache",
    "PersistentWeight",
    "Profile",
    "Projections",
    "Rope",
    "Savings",
    "Yarn",
    "add_position_embeddings",
    "apply_rope",
    "attention",
    "attention_output_projection",
    "attention_vram_savings",
    "dense",
    "dequantize",
    "embedding_cache",
    "embedding_lookup",
    "embedding_lookup_batch",
    "embedding_lookup_cached",
    "embedding_vram_savings",
    "ffn_forward",
    "ffn_forward_bias",
    "ffn_residual",
    "ffn_vram_savings",
    "fused_qkv_projection",
    "gemm",
    "gemm_batch",
    "gemm_bias",
    "gemm_persistent",
    "gemm_profile",
    "gemm_vram_savings",
    "grouped_query_attention",
    "kv_cache",
    "kv_cache_append",
    "kv_cache_read",
    "layer_norm",
    "lm_head_forward",
    "lm_head_forward_temperature",
    "lm_head_forward_topk",
    "lm_head_forward_topp",
    "lm_head_greedy",
    "lm_head_probabilities",
    "lm_head_sample",
    "lm_head_vram_savings",
    "moe_forward",
    "moe_router",
    "moe_vram_savings",
    "multi_head_attention",
    "persistent",
    "qkv_projection",
    "quantize",
    "rms_norm",
    "rope_table",
    "swiglu",
    "swiglu_ffn_forward",
    "vram_savings",
]
