"""Which rows the bench has, and selecting from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mxharness.bench import attending, elementwise, layers, products
from mxharness.bench.work import Work
from mxharness.device import Device
from mxharness.errors import UserError

Build = Callable[[Device, tuple[int, ...], int, str], Work]


@dataclass(frozen=True)
class Entry:
    """A row that can be measured."""

    op: str
    axes: str
    """What the sizes of the shape are, "N K"."""
    shape: tuple[int, ...]
    rows: int
    """Activations' rows, tokens or sequences; 0 where there are none beside the shape."""
    dtype: str
    build: Build
    quick: bool = False

    @property
    def label(self) -> str:
        """The shape as users type it, "4096x4096"."""
        return "x".join(map(str, self.shape))

    @property
    def key(self) -> str:
        """What names a row: "gemm 4096x4096 16 bf16"."""
        return " ".join((self.op, self.label, *([str(self.rows)] if self.rows else []), self.dtype))

    def work(self, device: Device) -> Work:
        """What to measure, made on the device."""
        return self.build(device, self.shape, self.rows, self.dtype)


SQUARES = ((2880, 2880), (4096, 4096))
SHAPES = (
    (2880, 2880),
    (5760, 2880),
    (4096, 4096),
    (16384, 4096),
    (4096, 16384),
    (50272, 4096),
)
"""N K of linear layers: gpt-oss's attention and experts, Llama's, OPT's LM head."""
ROWS = (1, 4, 16, 64, 256, 512, 2048)
_VOCABULARIES = ((50272, 4096), (201088, 2880))
_HEADS = ((32, 8, 128, 4096), (64, 8, 64, 4096))
"""H Hkv D S of Llama-3-8B and gpt-oss."""
_QUERIES = tuple(heads[:3] for heads in _HEADS)
_EXPERTS = ((32, 2880, 2880), (128, 2880, 2880))
"""E H I of gpt-oss-20b and 120b."""


@dataclass(frozen=True)
class _Spec:
    op: str
    axes: str
    build: Build
    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] = (0,)
    dtypes: tuple[str, ...] = ("bf16",)
    quick: tuple[int, ...] = ()
    """Rows of the first shapes that a quick bench measures."""
    quick_shapes: int = 1


_SPECS = (
    _Spec("dequantize", "N K", products.dequantize, (*SQUARES, *SHAPES[3::2]), dtypes=("bf16", "fp16"), quick=(0,)),
    _Spec("quantize", "N K", products.quantize, (*SQUARES, *SHAPES[3::2]), quick=(0,)),
    _Spec("gemm", "N K", products.gemm, SHAPES, ROWS, ("bf16", "fp16"), quick=(1, 16, 64, 256, 2048), quick_shapes=3),
    _Spec("gemm_bias", "N K", products.gemm_bias, SQUARES, (1, 16, 256, 2048)),
    _Spec("gemm_batch", "E N K", products.gemm_batch, ((8, 2880, 2880),), (1, 16, 256), quick=(16,)),
    _Spec("gemm_persistent", "N K", products.gemm_persistent, SHAPES[2:4], (1, 16, 64, 256, 2048), quick=(16,)),
    _Spec("embedding", "V K", elementwise.embedding, ((50272, 4096),), (1, 256, 2048), quick=(2048,)),
    _Spec("rms_norm", "K", elementwise.rms_norm, ((4096,),), (1, 16, 256, 2048), quick=(2048,)),
    _Spec("layer_norm", "K", elementwise.layer_norm, ((4096,),), (1, 2048)),
    _Spec("swiglu", "I", elementwise.swiglu, ((2880,),), (4, 1024, 8192)),
    _Spec("apply_rope", "H D", elementwise.apply_rope, ((32, 128),), (1, 2048)),
    _Spec("lm_head_greedy", "V K", layers.lm_head_greedy, _VOCABULARIES, (1, 4, 16, 64), quick=(1,)),
    _Spec("lm_head_topk", "V K", layers.lm_head_topk, _VOCABULARIES, (1, 16, 64)),
    _Spec("swiglu_ffn", "I H", layers.swiglu_ffn, ((14336, 4096),), (1, 16, 256, 2048), quick=(1,)),
    _Spec(
        "attention_prefill",
        "H Hkv D",
        attending.attention_prefill,
        ((32, 8, 128), (64, 8, 64)),
        (128, 256, 512, 2048),
        quick=(2048,),
    ),
    _Spec(
        "attention_prefill_batch",
        "B H Hkv D",
        attending.attention_prefill_batch,
        ((8, 32, 8, 128), (8, 64, 8, 64), (8, 32, 32, 128)),
        (128, 512),
    ),
    _Spec("attention_decode", "H Hkv D S", attending.attention_decode, _HEADS, (1, 16, 64), quick=(1,)),
    _Spec("attention_decode_mxfp4", "H Hkv D S", attending.attention_decode_mxfp4, _HEADS, (1, 16, 64), quick=(1,)),
    _Spec("kv_append", "Hkv D S", attending.kv_append, ((8, 128, 4096),), (1, 64)),
    _Spec("kv_append_mxfp4", "Hkv D S", attending.kv_append_mxfp4, ((8, 128, 4096),), (1, 64)),
    _Spec("moe", "E H I", layers.moe, _EXPERTS, (1, 16, 256, 2048), quick=(1, 256)),
)
ENTRIES = tuple(
    Entry(
        spec.op,
        spec.axes,
        shape,
        rows,
        dtype,
        spec.build,
        quick=rows in spec.quick and shape in spec.shapes[: spec.quick_shapes] and dtype == "bf16",
    )
    for spec in _SPECS
    for shape in spec.shapes
    for dtype in spec.dtypes
    for rows in spec.rows
)


def select(
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    rows: Sequence[int] = (),
    *,
    quick: bool = False,
    entries: Sequence[Entry] = ENTRIES,
) -> list[Entry]:
    """The entries of these operators, shapes and rows; nothing named, all. quick: the few that stand for the others.

    Raises UserError, saying what there is, for a name that no entry has, and where nothing has all of them.
    """
    _check(ops, {entry.op: None for entry in entries}, "operator")
    of_op = [entry for entry in entries if not ops or entry.op in ops]
    _check(shapes, {entry.label: None for entry in of_op}, "shape")
    of_shape = [entry for entry in of_op if not shapes or entry.label in shapes]
    _check([str(count) for count in rows], {str(entry.rows): None for entry in of_shape if entry.rows}, "row count")
    found = [entry for entry in of_shape if not rows or entry.rows in rows]
    if quick:
        found = [entry for entry in found if entry.quick]
    if not found:
        raise UserError("no quick row has this operator, shape and row count; leave out --quick")
    return found


def _check(wanted: Sequence[str], known: dict[str, None], what: str) -> None:
    for name in wanted:
        if name not in known:
            raise UserError(f"the bench has no {what} '{name}' there; there are {', '.join(known)}")
