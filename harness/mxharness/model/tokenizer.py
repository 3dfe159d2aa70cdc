"""Text to token ids: byte-level BPE built from a GGUF file's vocabulary and merges.

The rules that cut text before merging are llama.cpp's (`llm_tokenizer_bpe` in src/llama-vocab.cpp), which transformers
does not read from a GGUF file. No BOS is added, and names of special tokens inside a text are ordinary text.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from mxharness.errors import Unavailable, UserError

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Vocabulary

# tokenizer.ggml.pre: is every digit (any character of Unicode category N) cut off on its own before GPT-2's rule?
_SINGLE_DIGITS = {"gpt-2": False, "smollm": True}


def encode(vocabulary: Vocabulary, text: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The ids of `text`, (T,) int32.

    Raises UserError for a cutting rule that is not known, Unavailable without tokenizers.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ModuleNotFoundError as error:
        raise Unavailable("cutting text into tokens needs tokenizers: pip install 'mxharness[model]'") from error
    rule = vocabulary.pre_tokenizer
    if rule not in _SINGLE_DIGITS:
        raise UserError(f"no pre-tokenizer '{rule}'; there are {', '.join(sorted(_SINGLE_DIGITS))}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary.tokens)}, merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SINGLE_DIGITS[rule] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, gpt2])
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def ids_sha256(ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str:
    """The sha256 of a token stream: ids as little-endian int32, in hex."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
