"""The page in a real browser: search, a dropped image, a question, heatmaps, both orders, and failures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from serve_runs import PICTURES, Serving, serving
from take_screenshots import BROWSER, FLAGS, compare, drop, heatmap, question, search

import tercet
from tercet.search.index import Index, model_digest
from tercet.search.search import Query, Searcher
from tercet.serve.limits import ServeSettings

pytestmark = pytest.mark.skipif(not Path(BROWSER).exists(), reason=f"no browser at {BROWSER}; set TERCET_CHROMIUM")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


class Watched:
    """A page, what it requested, and the errors it logged."""

    def __init__(self, browser: Browser, url: str, width: int = 1440, height: int = 900) -> None:
        context = browser.new_context(viewport={"width": width, "height": height})
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.extend([message.text] * (message.type == "error")))
        self.page.goto(url)
        self.page.wait_for_selector("#about:not(:empty)", state="attached")

    def fits(self) -> bool:
        """Whether nothing overflows to the side."""
        return self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.fixture
def watched(browser: Browser, server: Serving) -> Iterator[Watched]:
    made = Watched(browser, server.url)
    yield made
    assert made.errors == []
    assert all(url.startswith((server.url, "blob:")) for url in made.requests), made.requests
    made.page.context.close()


def names(page: Page, within: str = "#grid") -> list[str]:
    return page.eval_on_selector_all(f"{within} .hit", "hits => hits.map(hit => hit.dataset.id)")


def test_it_opens_on_what_was_indexed_last(watched: Watched, server: Serving) -> None:
    page = watched.page
    page.wait_for_selector("#newest .hit")
    newest = [entry.id for entry in server.index.newest(24)]
    assert names(page, "#newest") == newest
    page.click("#newest .hit >> nth=1")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#position") == f"2 of {PICTURES}" and "cosine" not in page.inner_text("#facts")
    page.keyboard.press("Escape")
    search(page)
    assert page.is_hidden("#newest")
    page.go_back()
    page.wait_for_selector("#newest .hit")
    assert names(page) == [] and watched.fits()


def test_search_and_orders(watched: Watched, server: Serving) -> None:
    page = watched.page
    search(page, "a red circle")
    searcher = Searcher(server.index, server.predictor)
    reranked = [hit.id for hit in searcher.search(Query("a red circle", k=24))]
    assert names(page) == reranked and len(reranked) == PICTURES
    assert "q=a+red+circle" in page.url
    pictures = page.eval_on_selector_all("#grid img", "images => images.map(image => image.naturalWidth)")
    assert pictures[0] == 64
    page.check("[name=order][value=compare]", force=True)
    page.wait_for_selector("#compare .hit")
    dual = [hit.id for hit in searcher.search(Query("a red circle", k=24, rerank=0))]
    assert names(page, "#dual") == dual and names(page, "#reranked") == reranked
    page.reload()
    page.wait_for_selector("#grid .hit")
    assert page.input_value("#text") == "a red circle"


def test_a_dropped_picture_and_more_like_this(watched: Watched) -> None:
    page = watched.page
    drop(page)
    assert len(names(page)) == PICTURES and page.is_visible("#chip-image")
    assert page.is_hidden("#order")  # without words there is nothing to re-rank by
    page.click("#grid .hit >> nth=3")
    chosen = names(page)[3]
    page.click("#like")
    page.wait_for_function("id => location.search.includes(id)", arg=chosen)
    page.wait_for_function("count => document.querySelectorAll('#grid .hit').length === count", arg=PICTURES - 1)
    assert chosen not in names(page)
    page.go_back()
    page.click("#text")


def test_question_and_heatmap(watched: Watched, server: Serving) -> None:
    page = watched.page
    question(page)
    assert page.inner_text("#answer .best") in (server.predictor.model.answers or [])
    assert page.locator("#answer li").count() == 5
    page.click("#answer button")
    page.wait_for_selector("#words button >> text=whole question")
    assert page.locator("#words button").first.inner_text() == "how"
    assert "Where the question looks for its answer" in page.inner_text("#fit")
    page.keyboard.press("Escape")
    heatmap(page)
    assert page.locator("#words button").all_inner_texts() == ["two", "yellow", "triangles", "whole sentence"]
    assert page.get_attribute("#words button >> text=yellow", "aria-pressed") == "true"
    drawn = (
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(value => value)"
    )
    assert page.is_visible("#heat") and page.eval_on_selector("#heat", drawn)


def test_by_keyboard_alone(watched: Watched) -> None:
    page = watched.page
    page.keyboard.press("/")
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    page.wait_for_selector("#grid .hit")
    page.focus("#grid .hit >> nth=0")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.id") == names(page)[1]
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#position") == f"2 of {PICTURES}"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#position") == f"3 of {PICTURES}"
    page.keyboard.press("Escape")
    assert page.is_hidden("dialog")


def test_a_telephone(browser: Browser, server: Serving) -> None:
    narrow = Watched(browser, server.url, 360, 740)
    search(narrow.page)
    assert narrow.fits()
    compare(narrow.page)
    assert narrow.fits()
    narrow.page.click("#dual .hit >> nth=0")
    assert narrow.fits() and narrow.page.is_visible("#close")
    assert narrow.errors == []


def test_an_empty_index(browser: Browser, model_folder: Path, tmp_path: Path) -> None:
    predictor = tercet.load(model_folder)
    digest, embed_dim = model_digest(predictor.model), predictor.model.config.embed_dim
    index = Index.create(str(tmp_path / "index"), str(model_folder), digest, embed_dim)
    with serving(index, predictor, ServeSettings(port=0)) as running:
        empty = Watched(browser, running.url)
        assert "holds no pictures yet" in empty.page.inner_text("#hint")
        empty.page.fill("#text", "a red circle")
        empty.page.press("#text", "Enter")
        empty.page.wait_for_function("() => document.querySelector('#hint').textContent.includes('Nothing was found')")
        assert empty.errors == []


def test_an_index_that_breaks_and_a_server_that_goes(
    browser: Browser, index_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(index_folder, tmp_path / "index")
    with serving(Index.open(str(copy)), tercet.load(model_folder), ServeSettings(port=0)) as running:
        failing = Watched(browser, running.url)
        failing.page.wait_for_selector("#newest .hit")
        shutil.rmtree(copy)
        search(failing.page)
        message = failing.page.inner_text("#notice-text")
        assert "The index cannot be read at present" in message and str(tmp_path) not in message
        assert running.client.get("/readyz").status_code == 503
        shutil.copytree(index_folder, copy)
        failing.page.click("#again")
        failing.page.wait_for_selector("#grid .hit")
    failing.page.fill("#text", "a blue star")
    failing.page.press("#text", "Enter")
    failing.page.wait_for_selector("#notice:not([hidden])")
    assert "does not answer" in failing.page.inner_text("#notice-text")


def test_a_key_is_asked_for_once(browser: Browser, index_folder: Path, model_folder: Path) -> None:
    key = "correct-horse-battery"
    settings = ServeSettings(port=0, key=key)
    with serving(Index.open(str(index_folder)), tercet.load(model_folder), settings) as running:
        page = browser.new_context().new_page()
        page.goto(running.url)
        page.fill("#key-text", "wrong-horse-battery")
        page.press("#key-text", "Enter")
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#key-text", key)
        page.press("#key-text", "Enter")
        page.wait_for_selector("#about:not(:empty)", state="attached")
        search(page)
        page.wait_for_function("() => document.querySelector('#grid img').naturalWidth === 64")
        assert (page.get_attribute("#grid img >> nth=0", "src") or "").startswith("blob:")
