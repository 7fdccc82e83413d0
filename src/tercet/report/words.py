"""Numbers and texts as the report writes them, safe within HTML."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from tercet.report.record import finite


def is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def text(value: object) -> str | None:
    return None if value is None or value == "" else escape(str(value))


def count(value: object) -> str | None:
    if isinstance(value, int | float) and finite(value):
        return f"{int(value):,}"
    return None if value is None else escape(str(value))


def number(value: object) -> str | None:
    """Four significant digits at most."""
    if not isinstance(value, int | float) or not finite(float(value)):
        return None
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def minutes(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds / 60:,.1f}" if seconds < 6000 else f"{seconds / 60:,.0f}"


def percent(value: object) -> str:
    if not isinstance(value, int | float) or not finite(value):
        return "–"
    bar = f'<i style="width:{min(max(float(value), 0), 100):.1f}%"></i>'
    return f"{value:.1f}{bar}" if value >= 1 or value == 0 else f"{value:.2f}{bar}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def clock(time: object) -> str:
    if not isinstance(time, int | float) or not finite(time):
        return "–"
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError, ValueError):
        return "–"
