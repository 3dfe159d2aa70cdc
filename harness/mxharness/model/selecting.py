"""Which of a file's tensors go to MXFP4, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from mxharness.errors import UserError
from mxharness.model.parts import Part
from mxharness.mxfp4 import BLOCK

Form = Literal["gguf", "safetensors"]
FORMS: tuple[Form, ...] = ("gguf", "safetensors")
EXPERTS = ("*.mlp.experts.gate_up_proj", "*.mlp.experts.down_proj")
"""gpt-oss' experts in Hugging Face's naming."""
_DECODED = ("F32", "F16", "BF16", "MXFP4", "NVFP4", "Q", "IQ", "TQ")
# Left where no pattern asks for them: what quantising costs most and saves least, as gpt-oss' and llama.cpp's own files
_DEFAULTS = {
    "an embedding": ("token_embd*", "*embed*", "*.wte.*", "*.wpe.*", "wte.*", "wpe.*", "position_*", "token_types*"),
    "an output head": ("output.weight", "*lm_head*"),
    "a router": ("*ffn_gate_inp*", "*.router.*", "*.mlp.gate.weight", "*.block_sparse_moe.gate.weight"),
    "a norm": ("*norm*", "*.ln_*"),
    "a convolution": ("*conv*",),
}


def obstacle(part: Part, form: Form, *, experts_only: bool) -> str | None:
    """Why a tensor cannot be MXFP4 in a file of a form; None where it can. experts_only: of gpt-oss, in safetensors."""
    matrix, columns = len(part.shape) == 2, part.shape[-1] if part.shape else 1
    experts = any(fnmatchcase(part.name, pattern) for pattern in EXPERTS)
    embedding = any(fnmatchcase(part.name, pattern) for pattern in _DEFAULTS["an embedding"])
    reasons = {
        f"{part.format} is not decoded": not part.format.startswith(_DECODED),
        "no matrix": len(part.shape) < 2,
        f"rows of {columns}, no multiple of {BLOCK}": columns % BLOCK != 0,
        "no weight of a layer": form == "gguf" and not part.name.endswith("weight"),
    }
    if experts_only:
        reasons["transformers reads MXFP4 in gpt-oss' experts only"] = not experts
    elif form == "safetensors":
        reasons["compressed-tensors holds matrices called .weight only"] = not (
            matrix and part.name.endswith(".weight")
        )
        reasons["transformers reads MXFP4 in linear layers only"] = embedding
    return next((reason for reason, holds in reasons.items() if holds), None)


def select(
    parts: Sequence[Part], form: Form, only: Sequence[str], skip: Sequence[str], *, experts_only: bool
) -> dict[str, str | None]:
    """For each tensor by name why it is left, None where it goes to MXFP4 or is MXFP4 already.

    only, skip: names, with * and ?. Without `only`, embeddings, heads, routers, norms and convolutions are left. Raises
    UserError for a pattern that fits nothing, and where nothing is left to be MXFP4.
    """
    for option, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if not any(fnmatchcase(part.name, pattern) for part in parts):
                raise UserError(f"{option} '{pattern}' fits no tensor; there is, for one, '{parts[-1].name}'")
    why = {part.name: _reason(part, form, only, skip, experts_only) for part in parts}
    if all(why.values()):
        raise UserError(
            f"nothing would be MXFP4 of {len(parts)} tensors; '{parts[0].name}', for one: {why[parts[0].name]}"
        )
    chosen = {
        why[part.name] is None for part in parts if experts_only and obstacle(part, form, experts_only=True) is None
    }
    if len(chosen) > 1:
        raise UserError("gpt-oss in safetensors has all its experts in MXFP4 or none; these patterns choose some")
    return why


def _reason(part: Part, form: Form, only: Sequence[str], skip: Sequence[str], experts_only: bool) -> str | None:
    if reason := obstacle(part, form, experts_only=experts_only):
        return reason
    if part.format == "MXFP4":
        return None
    if any(fnmatchcase(part.name, pattern) for pattern in skip):
        return "skipped"
    if only:
        return None if any(fnmatchcase(part.name, pattern) for pattern in only) else "not among --only"
    for what, patterns in _DEFAULTS.items():
        if any(fnmatchcase(part.name, pattern) for pattern in patterns):
            return what
    return None
