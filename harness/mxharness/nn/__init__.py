"""Drop-in modules: torch layers whose weights are MXFP4, and `quantize_model`, which puts them into a model.

They run `mxharness.functional` on the device where their buffers lie. For inference: no gradient flows through them.
"""

from mxharness.nn.embedding import MXFP4Embedding
from mxharness.nn.linear import MXFP4Linear
from mxharness.nn.model import Left, QuantizationReport, Replaced, quantize_model
from mxharness.nn.packed import PackedModule

__all__ = [
    "Left",
    "MXFP4Embedding",
    "MXFP4Linear",
    "PackedModule",
    "QuantizationReport",
    "Replaced",
    "quantize_model",
]
