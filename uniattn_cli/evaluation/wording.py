"""Figures as text: the same digits in tables, report and sentences."""

from __future__ import annotations

from typing import Any

from uniattn_cli.evaluation.figures import Figure

# Unit of a figure: factor, decimals, what stands behind the number, what stands behind a difference.
_FORMATS = {
    "perplexity": (1, 2, "", ""),
    "nats per token": (1, 3, "", ""),
    "share": (100, 1, " %", " points"),
    "parameters": (1e-6, 1, " M", " M"),
    "bytes": (1e-6, 1, " MB", " MB"),
    "bytes per token": (1, 0, " B", " B"),
    "seconds": (1e3, 1, " ms", " ms"),
    "tokens per second": (1, 1, "", ""),
}
_OTHER = (1, 3, "", "")
# Tiny models, as in tests, are shown to the byte.
_SMALL = {"parameters": (1, 0, "", ""), "bytes": (1, 0, " B", " B")}


def _format(entry: Figure) -> tuple[float, int, str, str]:
    if entry.unit in _SMALL and entry.value < 1e6:
        return _SMALL[entry.unit]
    if entry.unit == "seconds" and entry.value >= 0.1:
        return (1e3, 0, " ms", " ms")
    return _FORMATS.get(entry.unit, _OTHER)


def as_value(entry: Figure, *, error: bool = False) -> str:
    """The value, with its standard error if asked for and known: `26.13 ± 0.41`, `46,080 B`."""
    factor, decimals, unit, _ = _format(entry)
    text = number(entry.value * factor, decimals)
    if error and entry.stderr is not None:
        text += f" ± {number(entry.stderr * factor, decimals)}"
    return text + unit


def as_range(entry: Figure) -> str:
    """Smallest and largest round: `790–850 ms`."""
    factor, decimals, unit, _ = _format(entry)
    low, high = (number(value * factor, decimals) for value in entry.range or ())
    return f"{low}–{high}{unit}"


def as_difference(entry: Figure, other: str = "base") -> str:
    """The difference to the base, or the control, with its standard error: `+4.89 ± 0.31`, `−1.0 ± 2.1 points`."""
    factor, decimals, _, unit = _format(entry)
    difference = entry.difference_to(other)
    assert difference is not None, "only what has a difference is asked for one"
    text = _signed(difference.value * factor, decimals)
    if difference.stderr is not None:
        text += f" ± {number(difference.stderr * factor, decimals)}"
    return text + unit


def as_interval(entry: Figure) -> str:
    """The 95 % interval of the difference to the base: `−3.6 to +0.0 points`; empty where there is none."""
    difference = entry.difference_to_base
    if difference is None or difference.interval is None:
        return ""
    interval = difference.interval
    factor, decimals, _, unit = _format(entry)
    return " to ".join(_signed(value * factor, decimals) for value in interval) + unit


def _signed(value: float, decimals: int) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value), decimals)


def as_ratio(entry: Figure) -> str:
    """The model divided by the base: `80.0 %`, `1.04×` for times and rates, and the reason where there is no ratio."""
    ratio = entry.ratio_to_base
    if ratio is None:
        return "other backend" if "second" in entry.unit else "other dtype"
    if "second" in entry.unit:
        return f"{ratio:.2f}×"
    return f"{100 * ratio:.1f} %"


def number(value: float, decimals: int) -> str:
    """With separators of thousands; huge values in scientific form."""
    return f"{value:.3g}" if abs(value) >= 1e7 else f"{value:,.{decimals}f}"


def as_setting(value: Any) -> str:
    """A setting as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {as_setting(item)}" for key, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_setting, value)) or "none"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return "none" if value is None else str(value)
