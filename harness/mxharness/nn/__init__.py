"""Drop-in modules: torch layers whose weights are MXFP4, and `quantize_model`, which puts them into a model.

They run `mxharness.functional` on the device where their buffers lie. For inference: no gradient flows through them.
"""

from mxharness.nn.activation import MXFP4LinearWithActivation
from mxharness.nn.embedding import MXFP4Embedding
from mxharness.nn.linear import MXFP4Linear
from mxharness.nn.model import Left, QuantizationReport, Replaced, quantize_model
from mxharness.nn.moe import MXFP4Experts, MXFP4MoE, create_quantized_mlp_block
from mxharness.nn.packed import PackedModule

__all__ = [
    "Left",
    "MXFP4Embedding",
    "MXFP4Experts",
    "MXFP4Linear",
    "MXFP4LinearWithActivation",
    "MXFP4MoE",
    "PackedModule",
    "QuantizationReport",
    "Replaced",
    "create_quantized_mlp_block",
    "quantize_model",
]
