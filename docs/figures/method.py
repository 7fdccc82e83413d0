"""Draw the method: encoders, teacher, and what each of the five objectives pulls together.

python docs/figures/method.py        # writes docs/images/method.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "images" / "method.svg"
WIDTH, HEIGHT = 1080, 410
INK, SOFT, PAPER = "#1c2329", "#5b6670", "#fbfaf7"
IMAGE, TEXT, FUSION, TEACHER = "#0b6aa8", "#12805c", "#8f3ea3", "#8a8f94"
OBJECTIVES = {"cma": "#c2500a", "imc": "#0b6aa8", "lmi": "#12805c", "itm": "#8f3ea3", "mlm": "#b3263a"}


def box(x: int, y: int, width: int, height: int, title: str, below: str, colour: str, dashed: bool = False) -> str:
    """A part of the model."""
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    middle = x + width / 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" fill-opacity="0.10" '
        f'stroke="{colour}" stroke-width="1.6"{dash}/>'
        + label(middle, y + height / 2 - 2, title, colour, 14, "600")
        + label(middle, y + height / 2 + 16, below, SOFT, 11)
    )


def label(x: float, y: float, text: str, colour: str = INK, size: int = 12, weight: str = "400") -> str:
    """Centred text."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def arrow(points: str, colour: str = SOFT, dashed: bool = False) -> str:
    """A path with a head at its end."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dash} marker-end="url(#head)"/>'


def objective(x: int, y: int, name: str, meaning: str) -> str:
    """A named loss and what it pulls together."""
    colour = OBJECTIVES[name]
    return (
        f'<rect x="{x}" y="{y}" width="44" height="22" rx="11" fill="{colour}"/>'
        + label(x + 22, y + 15.5, name, "#ffffff", 12, "700")
        + f'<text x="{x + 54}" y="{y + 15.5}" fill="{INK}" font-size="12">{escape(meaning)}</text>'
    )


def draw() -> str:
    """The whole figure as SVG."""
    parts = [
        label(75, 78, "an image", INK, 13, "600"),
        label(75, 94, "in two views", SOFT, 11),
        label(75, 248, "its caption", INK, 13, "600"),
        label(75, 264, "whole and with", SOFT, 11),
        label(75, 279, "masked tokens", SOFT, 11),
        box(170, 50, 150, 62, "image encoder", "ViT over patches", IMAGE),
        box(170, 220, 150, 62, "text encoder", "lower half of BERT", TEXT),
        box(170, 135, 150, 62, "teacher", "moving average of both", TEACHER, dashed=True),
        box(440, 50, 190, 62, "keys and values", "computed once per image", FUSION),
        box(440, 220, 190, 62, "fusion encoder", "upper half, reads the image", FUSION),
        arrow("M 125 82 L 164 82"),
        arrow("M 125 251 L 164 251"),
        arrow("M 245 112 L 245 130", TEACHER, dashed=True),
        arrow("M 245 220 L 245 202", TEACHER, dashed=True),
        arrow("M 320 81 L 434 81"),
        arrow("M 320 251 L 434 251"),
        arrow("M 570 112 L 570 214"),
        arrow("M 320 166 L 362 166", TEACHER, dashed=True),
        label(455, 162, "soft targets, and the features", SOFT, 11),
        label(455, 177, "of earlier batches in a queue", SOFT, 11),
        objective(690, 62, "cma", "an image and its text, both ways"),
        objective(690, 98, "imc", "an image and its other view, a text and its twin"),
        objective(690, 134, "lmi", "the whole and its own regions or words"),
        label(860, 46, "compared by the dual encoder and the teacher", SOFT, 11),
        objective(690, 226, "itm", "do they belong together? against hard negatives"),
        objective(690, 262, "mlm", "masked tokens, from text and image"),
        label(860, 212, "read from the fused text", SOFT, 11),
        f'<line x1="40" y1="318" x2="{WIDTH - 40}" y2="318" stroke="#d8d6cf"/>',
        label(WIDTH / 2, 344, "What remains after training", INK, 13, "600"),
        label(200, 370, "search: compare unit vectors", IMAGE, 12, "600"),
        label(200, 387, "image_feats · text_feats", SOFT, 11),
        label(540, 370, "re-rank and match: fuse the best", FUSION, 12, "600"),
        label(540, 387, "itm_logits, from the keys and values", SOFT, 11),
        label(880, 370, "answer, ground, classify", OBJECTIVES["mlm"], 12, "600"),
        label(880, 387, "heads that fine-tuning adds", SOFT, 11),
    ]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{SOFT}"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Image encoder, text encoder and fusion encoder with their teacher and five objectives" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, Arial, sans-serif">'
        f'{head}<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(draw(), "utf-8")
    print(f"The figure is {TARGET}.")
