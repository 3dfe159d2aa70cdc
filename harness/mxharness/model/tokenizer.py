"""Text to token ids and back: byte-level BPE from a GGUF file's vocabulary and merges, or a tokenizer.json.

The rules that cut text before merging are llama.cpp's (`llm_tokenizer_bpe` in src/llama-vocab.cpp), which transformers
does not read from a GGUF file. No BOS is added, and names of special tokens inside a text are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mxharness.errors import Unavailable, UserError
from mxharness.model.checkpoint import Vocabulary

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre: the pattern whose matches are cut apart, None for GPT-2's own; and whether every digit (any
# character of Unicode category N) is cut off on its own first
_RULES: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
        False,
    ),
    "qwen2": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
        False,
    ),
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        False,
    ),
}
_WHOLE_WORDS = ("llama-bpe",)
"""Rules whose words that are tokens are taken whole, whatever the merges."""
_UNFINISHED = "\ufffd"
"""What bytes that are no whole character decode to."""


def encode(vocabulary: Vocabulary | Path | None, text: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The ids of `text`, (T,) int32.

    Raises UserError without a tokenizer, for a cutting rule that is not known and for a damaged tokenizer.json;
    Unavailable without tokenizers.
    """
    return np.asarray(_tokenizer(vocabulary).encode(text, add_special_tokens=False).ids, dtype=np.int32)


def decode(vocabulary: Vocabulary | Path | None, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD.

    Raises UserError for ids outside the vocabulary, and as `encode` does.
    """
    return _text(_tokenizer(vocabulary), [int(i) for i in ids])


def stream(vocabulary: Vocabulary | Path | None, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids as they come: one piece for each id, "" while a character is not complete.

    The pieces together are what `decode` gives for all ids; a last piece carries what stayed incomplete. Raises
    UserError as `decode` does.
    """
    tokenizer = _tokenizer(vocabulary)
    seen: list[int] = []
    start = shown = 0  # ids from `start` on are decoded together, so that pieces join as they do in the whole text
    for one in ids:
        seen.append(int(one))
        before, now = _text(tokenizer, seen[start:shown]), _text(tokenizer, seen[start:])
        if now.endswith(_UNFINISHED):
            yield ""
            continue
        start, shown = shown, len(seen)
        yield now[len(before) :]
    if rest := _text(tokenizer, seen[start:])[len(_text(tokenizer, seen[start:shown])) :]:
        yield rest


def to_json(vocabulary: Vocabulary) -> str:
    """A tokenizer.json of a GGUF file's tokenizer. Raises as `encode` does."""
    return str(_from_merges(vocabulary).to_str(pretty=False))


def from_json(path: Path) -> tuple[Vocabulary, tuple[int, ...]] | None:
    """What GGUF keeps of a tokenizer.json: vocabulary and merges, and the ids of special tokens.

    None where it is no byte-level BPE, or cuts text by a rule that has no name here. Raises UserError for a damaged
    file.
    """
    document = json.loads(_from_json(path).to_str())
    model, added = document["model"], document["added_tokens"]
    rule = next((rule for rule in _RULES if _cuts(document["pre_tokenizer"]) == _cuts(_pre_tokenizer(rule))), None)
    if model["type"] != "BPE" or rule is None:
        return None
    ids = {**model["vocab"], **{one["content"]: one["id"] for one in added}}
    if sorted(ids.values()) != list(range(len(ids))):
        return None
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    special = tuple(one["id"] for one in added if one["special"])
    return Vocabulary(tuple(sorted(ids, key=ids.__getitem__)), tuple(merges), rule), special


def ids_sha256(ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str:
    """The sha256 of a token stream: ids as little-endian int32, in hex."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def _text(tokenizer: Any, ids: list[int]) -> str:  # noqa: ANN401  tokenizers ships no types
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.get_vocab_size():
        raise UserError(
            f"token ids from {min(ids)} to {max(ids)}; the tokenizer has 0 to {tokenizer.get_vocab_size() - 1}"
        )
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _tokenizer(vocabulary: Vocabulary | Path | None) -> Any:  # noqa: ANN401  tokenizers ships no types
    if vocabulary is None:
        raise UserError("this model has no tokenizer, so it takes token ids and no text")
    return _from_json(vocabulary) if isinstance(vocabulary, Path) else _from_merges(vocabulary)


def _from_json(path: Path) -> Any:  # noqa: ANN401  tokenizers ships no types
    library = _library()
    try:
        tokenizer = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UserError(f"{path} holds no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if tokenizer.decoder is None and "ByteLevel" in str(tokenizer.pre_tokenizer):
        tokenizer.decoder = library.decoders.ByteLevel()  # some files leave out how bytes become text again
    return tokenizer


@lru_cache(maxsize=4)
def _from_merges(vocabulary: Vocabulary) -> Any:  # noqa: ANN401  tokenizers ships no types
    library = _library()
    rule = vocabulary.pre_tokenizer
    if rule not in _RULES:
        raise UserError(f"no pre-tokenizer '{rule}'; there are {', '.join(sorted(_RULES))}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    try:
        tokenizer = library.Tokenizer(
            library.models.BPE(
                {token: i for i, token in enumerate(vocabulary.tokens)}, merges, ignore_merges=rule in _WHOLE_WORDS
            )
        )
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UserError(f"this vocabulary and its merges do not belong together: {error}") from error
    cut = library.pre_tokenizers
    pattern, digits = _RULES[rule]
    steps = [cut.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(cut.Split(library.Regex(pattern), behavior="isolated"))
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = cut.Sequence(steps)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _cuts(step: Mapping[str, Any] | None) -> list[tuple[object, ...]]:
    """What a pre-tokenizer of a tokenizer.json does, step by step, without what changes no id."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [cut for one in step["pretokenizers"] for cut in _cuts(one)]
    kept = ("type", "individual_digits", "add_prefix_space", "use_regex", "pattern", "behavior", "invert")
    return [tuple((name, str(step[name])) for name in kept if name in step)]


@cache
def _pre_tokenizer(rule: str) -> dict[str, Any]:
    """A rule as a tokenizer.json writes it."""
    document: dict[str, Any] = json.loads(_from_merges(Vocabulary((), (), rule)).to_str())["pre_tokenizer"]
    return document


def _library() -> Any:  # noqa: ANN401  tokenizers ships no types
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise Unavailable("cutting text into tokens needs tokenizers: pip install 'mxharness[model]'") from error
    return tokenizers
