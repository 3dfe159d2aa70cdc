"""Name the shape of a fault: which rule over the places of an output explains its failing elements best.

A place is one integer per element: a row, a feature, a K block, an expert, a lane (places.py). A rule holds for every
failing element; among the rules, and pairs of rules over two places, the one that covers the fewest healthy elements
wins, the plainer of two that are about as good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

Places = Mapping[str, torch.Tensor]
"""Name of a place to its number in every element; integers that broadcast to the output. A number below 0 is no place:
no rule speaks about such elements. A name that begins with "where" has the number 1 where it is true."""

TILES = (128, 64, 32, 16, 8)
_PLURALS = {"matrix": "matrices", "index": "indices", "entry": "entries"}
_BORNE_OUT = 0.5
"""The share of a rule's elements that must fail for the rule to be named."""
_TIMES = 3
"""Fewer failing elements than this many for each number of a list, or for a pair of rules, may agree by chance."""
_NARROWER = 0.65
"""A rule must leave out this share of the healthy elements; a pair of rules, of those that one rule leaves in."""


@dataclass(frozen=True)
class Rule:
    """A phrase and the elements (flat, bool) that it covers."""

    phrase: str
    mask: torch.Tensor
    cost: int
    """How much it takes to say; the plainer of two equals is named."""


def describe(bad: torch.Tensor, places: Places | None = None) -> str:
    """One phrase for a bool tensor with at least one true element; without places its indices are the places."""
    count, total = int(bad.sum()), bad.numel()
    if count == total:
        return "every element"
    known = indices(bad.shape) if places is None else places
    rules = [rule for name, place in known.items() for rule in _rules(name, place, bad)]
    single = _best(rules, count)
    best = single
    if single is not None and count > _TIMES and _healthy(single, count) > 0:
        pair = _best(list(_pairs(rules, count)), count)
        if pair is not None and _healthy(pair, count) <= _NARROWER * _healthy(single, count):
            best = pair
    if best is not None and _healthy(best, count) <= _NARROWER * (total - count):
        if count >= _BORNE_OUT * int(best.mask.sum()) and (count > 1 or total <= 2 or best.cost <= 1):
            return best.phrase
        if count > 1:
            return f"scattered; the narrowest rule that holds them all is {best.phrase}"
    if count == 1:
        return "one element"
    return f"nearly every element ({count / total:.0%})" if count > 0.8 * total else "scattered"


def indices(shape: torch.Size | tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Row, axis-1 index, ..., column of a tensor, as places."""
    last = len(shape) - 1
    names = {0: "row", last: "column"}
    return along(shape, *(names.get(axis, f"axis-{axis} index") for axis in range(len(shape))))


def along(shape: torch.Size | tuple[int, ...], *names: str) -> dict[str, torch.Tensor]:
    """The indices of a tensor of this shape as places; a name for every axis, "" for one that has none."""
    found = {}
    for axis, (name, size) in enumerate(zip(names, shape, strict=True)):
        if name:
            found[name] = torch.arange(size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return found


def _healthy(rule: Rule, count: int) -> int:
    """Elements that the rule covers and that did not fail."""
    return int(rule.mask.sum()) - count


def _best(rules: list[Rule], count: int) -> Rule | None:
    """The rule with the fewest healthy elements; within a tenth of its size the plainer one, then the first."""
    if not rules:
        return None
    sizes = [_healthy(rule, count) for rule in rules]
    room = min(sizes) + 0.1 * count
    return min((rule for rule, size in zip(rules, sizes, strict=True) if size <= room), key=lambda rule: rule.cost)


def _pairs(rules: list[Rule], count: int) -> Iterator[Rule]:
    """Two rules over two places together, from the narrowest rules of each place."""
    narrow = sorted(rules, key=lambda rule: (_healthy(rule, count), rule.cost))[:24]
    for i, first in enumerate(narrow):
        for second in narrow[i + 1 :]:
            mask = first.mask & second.mask
            if int(mask.sum()) < min(int(first.mask.sum()), int(second.mask.sum())):
                inner, outer = sorted((first, second), key=lambda rule: rule.mask.sum().item())
                yield Rule(f"{inner.phrase}, in {outer.phrase}", mask, first.cost + second.cost + 2)


def plural(name: str) -> str:
    """Of a place's name."""
    thing, *rest = re.split(r"(?= (?:of|in) )", name, maxsplit=1)
    head, _, last = thing.rpartition(" ")
    return f"{head} {_PLURALS.get(last, f'{last}s')}".strip() + "".join(rest)


def _rules(name: str, place: torch.Tensor, bad: torch.Tensor) -> Iterator[Rule]:
    """Every rule about one place that its failing elements do not contradict."""
    value = place.expand(bad.shape).flatten()
    hit = sorted(set(value[bad.flatten()].tolist()))
    there = sorted(set(value[value >= 0].tolist()))
    if len(there) > 1 and hit[0] >= 0:
        yield from _values(name, value, hit, there, int(bad.sum()))
        if not name.startswith("where "):
            yield from _ranges(name, value, hit, there)


def _values(name: str, value: torch.Tensor, hit: list[int], there: list[int], failing: int) -> Iterator[Rule]:
    """Rules about numbers by themselves: one, some, all but one, even or odd, those with one remainder."""
    if name.startswith("where "):  # yes or no
        if hit == [1]:
            yield Rule(name, value == 1, 1)
        return
    first, several = hit[0], plural(name)
    if len(hit) == 1:
        if first == there[-1] > 1:
            yield Rule(f"the last {name} ({first})", value == first, 0)
        yield Rule(f"{name} {first} alone", value == first, 1)
    for parity, word in ((0, "even"), (1, "odd")):
        if all(v % 2 == parity for v in hit) and any(v % 2 != parity for v in there):
            what = "nibble" if name == "k" else name
            yield Rule(f"every {word} {what}", (value >= 0) & (value % 2 == parity), 1)
    if 1 < len(hit) <= 4 and hit[-1] - first >= len(hit) and failing >= _TIMES * len(hit):
        yield Rule(f"{several} {', '.join(map(str, hit))}", torch.isin(value, torch.tensor(hit)), 3 + len(hit))
    right = sorted(set(there) - set(hit))
    if len(right) == 1 and len(there) > 2 and right[0] not in (there[0], there[-1]):
        yield Rule(f"every {name} but {right[0]}", (value >= 0) & (value != right[0]), 3)
    for modulus in (32, 64, 16, 8, 4):
        if there[-1] >= 2 * modulus and len(hit) > 1 and len({v % modulus for v in hit}) == 1:
            phrase = f"element {first % modulus} of each block of {modulus} {several}"
            yield Rule(phrase, (value >= 0) & (value % modulus == first % modulus), 2)


def _ranges(name: str, value: torch.Tensor, hit: list[int], there: list[int]) -> Iterator[Rule]:
    """Rules about numbers that follow one another: tiles, the tail of tiles, from one on, up to one."""
    first, last, lowest, highest = hit[0], hit[-1], there[0], there[-1]
    several = plural(name)
    for tile in TILES:
        start = highest // tile * tile
        if lowest < start <= first:
            tail = highest + 1 - start
            named = f"{tail} {several}" if tail > 1 else name
            yield Rule(f"the last {named} (the tail of tiles of {tile})", value >= start, 1)
        begin, end = first // tile * tile, first // tile * tile + tile - 1
        if last <= end and (lowest < begin or highest > end):
            phrase = f"{several} {begin} to {min(highest, end)}"
            yield Rule(phrase, (value >= begin) & (value <= end), 2)
    if lowest < first < last == highest:
        yield Rule(f"{several} from {first} on", value >= first, 2)
    if lowest == first < last < highest:
        yield Rule(f"{several} up to {last}", (value >= 0) & (value <= last), 2)
    if lowest < first < last < highest:
        yield Rule(f"{several} {first} to {last}", (value >= first) & (value <= last), 3)
