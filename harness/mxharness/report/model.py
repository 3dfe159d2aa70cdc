"""The section "Perplexity" of a report: what the kernels do to a model, beside float32, with intervals and the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxharness.document import Labelled
from mxharness.record import RunRecord, perplexity_holds
from mxharness.report import checks

_SHOWN = frozenset(
    (
        *("name", "text", "protocol", "weights", "activations", "passed", "message", "command", "tokens_scored"),
        *("perplexity", "perplexity_lower", "perplexity_upper", "perplexity_decoded_float32"),
        *("perplexity_original_float32", "change", "change_lower", "change_upper"),
        *("kl", "kl_lower", "kl_upper", "same_word", "gate", "tokens_per_second"),
    )
)
"""What a model's rows and sentences say; whatever else a record holds stands under "more"."""


@dataclass(frozen=True)
class Way:
    """One way of computing the model."""

    how: str
    perplexity: str
    """With its bounds where they are known."""
    change: str
    """Of the perplexity, against what; empty for what others are held against."""


@dataclass(frozen=True)
class Model:
    """One model on one text."""

    title: str
    passed: bool
    gate: str
    """The gate's word; empty where it did not run."""
    ways: tuple[Way, ...]
    facts: tuple[tuple[str, str], ...]
    message: tuple[str, ...]
    """By what it is judged, in parts."""
    command: str
    more: tuple[tuple[str, object], ...]


def models(record: RunRecord) -> list[Model]:
    """One entry a perplexity of the record."""
    return [_model(row) for row in record.perplexity]


def _model(row: Labelled) -> Model:
    text = {name: str(row[name]) for name in ("name", "text", "protocol", "weights", "activations") if name in row}
    weights = text.get("weights", "MXFP4")
    kernels = f"the kernels: {weights}, {text.get('activations', '16-bit')} activations"
    ways = [
        Way(
            kernels,
            _with_bounds(row, "perplexity", lambda number: checks.short(number, 6)),
            _with_bounds(row, "change", percent, " against float32 on the same weights"),
        )
    ]
    for name, how in (
        ("perplexity_decoded_float32", "float32 in torch, on the same weights decoded"),
        ("perplexity_original_float32", "float32 in torch, on the weights before they were quantised"),
    ):
        if name in row:
            ways.append(Way(how, checks.short(row[name], 6), ""))
    decoded, original = (row.get(f"perplexity_{name}_float32") for name in ("decoded", "original"))
    if isinstance(decoded, float) and isinstance(original, float):
        cost = f"{percent(decoded / original - 1)} against the last row: what the format itself costs"
        ways[1] = Way(ways[1].how, ways[1].perplexity, cost)
    facts = {
        "Text": text.get("text", ""),
        "Protocol": text.get("protocol", ""),
        "Tokens scored": f"{row['tokens_scored']:,}" if "tokens_scored" in row else "",
        "KL divergence": _with_bounds(row, "kl", lambda number: checks.short(number, 3), " nats per token"),
        "Same most probable word": f"{float(str(row['same_word'])):.2%}" if "same_word" in row else "",
        "Speed": f"{float(str(row['tokens_per_second'])):,.0f} tokens/s" if "tokens_per_second" in row else "",
    }
    return Model(
        title=text.get("name", "?"),
        passed=perplexity_holds(row),
        gate=str(row.get("gate", "")),
        ways=tuple(ways),
        facts=tuple((name, said) for name, said in facts.items() if said),
        message=tuple(checks.clauses(str(row.get("message", "")))),
        command=str(row.get("command", "")),
        more=tuple((name, said) for name, said in row.items() if name not in _SHOWN),
    )


def _with_bounds(row: Labelled, name: str, said: Callable[[object], str], unit: str = "") -> str:
    """As "27.98 (25.1 to 31.2)" of the columns `name`, `name`_lower and `name`_upper; empty where there is none."""
    if name not in row:
        return ""
    interval = bounds(row, name, said)
    return f"{said(row[name])}{f' ({interval})' if interval else ''}{unit}"


def bounds(row: Labelled, name: str, said: Callable[[object], str]) -> str:
    """As "25.1 to 31.2" of the columns `name`_lower and `name`_upper; empty where the record has none."""
    ends = [row.get(f"{name}_{end}") for end in ("lower", "upper")]
    return "" if None in ends else " to ".join(map(said, ends))


def percent(number: object) -> str:
    """A share, with its sign."""
    return f"{float(str(number)):+.3%}"
