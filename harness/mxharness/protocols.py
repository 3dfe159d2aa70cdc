"""Which windows of a token stream are read, and which of their tokens are scored.

The protocol alone moves a perplexity by 45 %, so it has a name and every result states it. Sources: llama.cpp's
perplexity tool for the second half of windows, the Hugging Face guide "Perplexity of fixed-length models" for the
sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxharness.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How a token stream is cut into windows and which tokens of a window are scored."""

    name: str
    window: int
    stride: int
    first: int
    """First scored position of the first window (position 0 has no prediction)."""
    later: int
    """First scored position of every later window."""
    tail: bool
    """Whether a last, shorter window is read."""
    summary: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("windows-512-half", 512, 512, 257, 257, False, "windows of 512, tokens 257 to 511 of each scored"),
        Protocol("windows-512-all", 512, 512, 1, 1, False, "windows of 512, tokens 1 to 511 of each scored"),
        Protocol("sliding-1024-512", 1024, 512, 1, 512, True, "windows of 1024 every 512, every token scored once"),
    )
}
DEFAULT_PROTOCOL = "windows-512-half"
DEFAULT_WINDOWS = 64


@dataclass(frozen=True)
class Span:
    """One window: tokens start to stop - 1 are read, tokens first to stop - 1 are scored."""

    start: int
    stop: int
    first: int


def spans(protocol: Protocol, tokens: int) -> tuple[Span, ...]:
    """Every window of a stream of `tokens` tokens."""
    result = []
    for start in range(0, tokens, protocol.stride):
        stop = min(start + protocol.window, tokens)
        first = start + (protocol.later if start else protocol.first)
        if first >= stop or (stop - start < protocol.window and not protocol.tail):
            break
        result.append(Span(start, stop, first))
        if stop == tokens:
            break
    return tuple(result)


def select(windows: Sequence[Span], count: int | None) -> tuple[Span, ...]:
    """`count` evenly spaced windows, (0, 9, .., 567) for 64 of 592; all of them for None or where there are fewer.

    More than half of the windows have no whole step between them: the gaps are then spread evenly.
    """
    if count is not None and count < 1:
        raise UserError(f"cannot measure {count} windows; take 1 or more, or all")
    if count is None or count >= len(windows):
        return tuple(windows)
    step = len(windows) // count
    return tuple(windows[i * step if step > 1 else i * len(windows) // count] for i in range(count))
