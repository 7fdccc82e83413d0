"""Screenshots of the page for docs/images/, of synthetic scenes alone.

    python tests/serve/take_screenshots.py http://127.0.0.1:8000/ docs/images

Each picture holds the page 1440 px wide and 360 px wide, one light and one dark.  The server must hold scenes.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tercet.data.scene_files import encode_jpeg
from tercet.data.scenes import split_scenes

BROWSER = os.environ.get("TERCET_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DROP = """([base64]) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "scene.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""
WORDS = "two yellow triangles"


def search(page: Page, words: str = WORDS) -> None:
    """Search by words."""
    page.fill("#text", words)
    page.press("#text", "Enter")
    page.wait_for_selector("#grid .hit, #notice:not([hidden])")
    page.wait_for_load_state("networkidle")


def compare(page: Page) -> None:
    """Both orders."""
    search(page)
    page.check("[name=order][value=compare]", force=True)
    page.wait_for_selector("#compare .hit")
    page.wait_for_load_state("networkidle")


def drop(page: Page) -> None:
    """Search by a picture that is dropped."""
    picture = encode_jpeg(next(split_scenes("validation", 1, 2)).image)
    page.evaluate(DROP, [base64.b64encode(picture).decode()])
    page.wait_for_selector("#grid .hit")
    page.wait_for_load_state("networkidle")


def question(page: Page, text: str = "how many triangles are there?") -> None:
    """Ask about the first picture."""
    search(page)
    page.click("#grid .hit >> nth=0")
    page.fill("#question", text)
    page.click("#ask button")
    page.wait_for_selector("#answer .best, #answer .wrong")


def answer(page: Page) -> None:
    """See what an answer about the first picture rests on."""
    question(page, "what colour is the lowest triangle?")
    page.click("#answer button")
    page.wait_for_selector("#words button >> text=whole question")
    page.wait_for_timeout(300)


def heatmap(page: Page) -> None:
    """See a word of the query in the first picture."""
    question(page)
    page.click("#why .line button")
    page.click("#words button >> text=yellow")
    page.wait_for_timeout(300)


def empty(page: Page) -> None:
    """An index without pictures."""
    about = {"version": "", "images": 0, "answers_questions": False, "body_bytes": 10**7}
    page.route("**/v1/about", lambda route: route.fulfill(json=about))
    page.reload()
    page.wait_for_selector("#hint code")


def error(page: Page) -> None:
    """A server that fails."""
    fault = {"error": {"code": "failed", "message": "the server failed at this request; its log says why"}}
    page.route("**/v1/search", lambda route: route.fulfill(status=500, json=fault))
    search(page)


STATES: dict[str, Callable[[Page], None]] = {
    act.__name__: act for act in (search, compare, drop, question, answer, heatmap, empty, error)
}


def shoot(browser: Browser, url: str, act: Callable[[Page], None], width: int, dark: bool) -> Image.Image:
    """The page of a width after `act`."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#about:not(:empty)", state="attached")
    act(page)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    context.close()
    return shot


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--states", nargs="*", default=list(STATES))
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        for name in arguments.states:
            for dark in (False, True) if name == "search" else (False,):
                shots = [shoot(browser, arguments.url, STATES[name], *size) for size in ((1440, dark), (360, not dark))]
                both = Image.new("RGB", (1440 + 24 + 360, 800), "#888888")
                both.paste(shots[0], (0, 0))
                both.paste(shots[1], (1464, 0))
                small = both.resize((both.width * 2 // 3, both.height * 2 // 3), Image.Resampling.LANCZOS)
                file = arguments.folder / f"serve-{name}{'-dark' if dark else ''}.png"
                small.quantize(192, dither=Image.Dither.NONE).save(file, optimize=True)
                print(file, file.stat().st_size)
        browser.close()


if __name__ == "__main__":
    main()
