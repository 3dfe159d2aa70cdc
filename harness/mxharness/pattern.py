"""Name the shape of a fault: which rule over an element's place explains the failing elements best."""

from __future__ import annotations

import torch


def describe(bad: torch.Tensor) -> str:
    """One phrase for a bool tensor with at least one true element.

    Among the rules that hold for every failing element, the one that covers the fewest others wins; a rule that fewer
    than half of its elements bear out is not named.
    """
    if bad.all():
        return "every element"
    rules = [rule for axis in range(bad.ndim) for rule in _rules(bad, axis)]
    best, best_share = "", 0.0
    for name, mask in rules:
        if bool((bad & ~mask).any()):
            continue
        share = float(bad.sum()) / float(mask.sum())
        if share > best_share:
            best, best_share = name, share
    if best_share >= 0.5:
        return best
    if int(bad.sum()) == 1:
        return "one element"
    return f"scattered; the narrowest rule that holds them all is {best}" if best else "scattered"


def _rules(bad: torch.Tensor, axis: int) -> list[tuple[str, torch.Tensor]]:
    """Rules over the index along one axis, as (phrase, mask of the elements it covers)."""
    size = bad.shape[axis]
    index = torch.arange(size).reshape([-1 if i == axis else 1 for i in range(bad.ndim)]).expand(bad.shape)
    name = {0: "row", bad.ndim - 1: "column"}.get(axis, f"axis-{axis} index")
    hit = (
        bad.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if bad.ndim > 1
        else bad.nonzero().flatten().tolist()
    )
    rules: list[tuple[str, torch.Tensor]] = []
    if size == 1:
        return rules
    if len(hit) == 1:
        rules.append((f"{name} {hit[0]} alone", index == hit[0]))
    for parity, word in ((0, "even"), (1, "odd")):
        rules.append((f"every {word} {name}", index % 2 == parity))
    for tile in (128, 64, 32, 16, 8):  # the first of equals is named
        if size > tile:
            start = (size - 1) // tile * tile
            rules.append((f"the last {size - start} {name}s (the tail of tiles of {tile})", index >= start))
            blocks = {i // tile for i in hit}
            if len(blocks) == 1:
                block = blocks.pop()
                rules.append((f"{name}s {block * tile} to {min(size, (block + 1) * tile) - 1}", index // tile == block))
    low, high = min(hit), max(hit)
    if low > 0 and high == size - 1:
        rules.append((f"{name}s from {low} on", index >= low))
    if high < size - 1 and low == 0:
        rules.append((f"{name}s up to {high}", index <= high))
    remainders = {i % 32 for i in hit}
    if size > 32 and len(remainders) == 1:
        rules.append((f"element {remainders.copy().pop()} of each block of 32 {name}s", index % 32 == hit[0] % 32))
    return rules
