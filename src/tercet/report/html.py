"""Parts of the pages: sections, figures, images and numbers as HTML that is safe whatever a run or a caption holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from importlib import resources

from tercet.report.run import is_finite
from tercet.version import __version__

THUMBNAIL = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page can load nothing from any network


def html_page(title: str, sections: Iterable[str]) -> str:
    """A page of the sections that are not empty."""
    style = resources.files("tercet.report").joinpath("style.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + f"\n<footer>Tercet {escape(__version__)} · written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, note: str = "", legend: str = "") -> str:
    """A section with its heading; nothing where it has no body."""
    if not body:
        return ""
    small = f" <small>{note}</small>" if note else ""
    below = f"<p class=legend>{legend}</p>" if legend else ""
    return f"<section><h2>{title}{small}</h2>{below}{body}</section>"


def header(kicker: str, title: str, facts: Mapping[str, str | None]) -> str:
    """The top of a page; facts are HTML, and those that are None or empty are skipped."""
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items() if value)
    listed = f"<dl class=facts>{cells}</dl>" if cells else ""
    return f"<header><p class=kicker>{kicker}</p><h1>{escape(title)}</h1>{listed}</header>"


def missing_section(sentences: Iterable[tuple[str | None, str]]) -> str:
    """What run folders lack: names of runs, where there are several, and sentences."""
    items = "".join(f"<li>{escape(f'{name}: {said}' if name else said)}</li>" for name, said in sentences)
    return f"<aside><h2>What is missing</h2><ul>{items}</ul></aside>" if items else ""


def figure(name: str, key: str, svg: str, more: str = "") -> str:
    """A chart with its caption."""
    code = f" <code>{escape(key)}</code>" if key else ""
    return f"<figure><figcaption><span>{escape(name)}{code}</span>{more}</figcaption>{svg}</figure>"


def image(url: object, name: str) -> str:
    """An embedded picture, or that there is none; `url` is not trusted."""
    if isinstance(url, str) and THUMBNAIL.fullmatch(url):
        return f'<img src="{url}" alt="{escape(name)}" loading="lazy">'
    return "<span class=blank>no picture</span>"


def text(value: object) -> str | None:
    """A value as HTML; None for none."""
    return None if value is None or value == "" else escape(str(value))


def count(value: object) -> str | None:
    """A number with separators of thousands."""
    return f"{int(value):,}" if isinstance(value, int | float) and is_finite(value) else text(value)


def number(value: object) -> str | None:
    """A number with four significant digits at most."""
    if not isinstance(value, int | float) or not is_finite(float(value)):
        return None
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
