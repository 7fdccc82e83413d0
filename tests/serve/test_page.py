"""The page in a real browser: search, a dropped image, a question, heatmaps, both orders, and failures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def opened(browser: Browser, url: str, width: int = 1440, height: int = 900, fails: bool = False) -> Iterator[Page]:
    """The page; it asks nothing of other servers and, unless it is to fail, logs no errors."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(60_000)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.extend([message.text] * (message.type == "error")))
    page.goto(url)
    page.wait_for_selector("#about:not(:empty)", state="attached")
    yield page
    assert fails or errors == []
    assert all(asked.startswith((url, "blob:")) for asked in requests), requests
    page.context.close()


@pytest.fixture
def page(browser: Browser, server: Serving) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        yield page


def names(page: Page, within: str = "#grid") -> list[str]:
    return page.eval_on_selector_all(f"{within} .hit", "hits => hits.map(hit => hit.dataset.id)")


def fits(page: Page) -> bool:
    """Whether nothing overflows to the side."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def enter(page: Page, field: str, text: str) -> None:
    page.fill(field, text)
    page.press(field, "Enter")


def test_it_opens_on_what_was_indexed_last(page: Page, server: Serving) -> None:
    page.wait_for_selector("#newest .hit")
    assert names(page, "#newest") == [entry.id for entry in server.index.newest(24)]
    page.click("#newest .hit >> nth=1")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#position") == f"2 of {PICTURES}" and "cosine" not in page.inner_text("#facts")
    page.keyboard.press("Escape")
    search(page)
    assert page.is_hidden("#newest")
    page.go_back()
    page.wait_for_selector("#newest .hit")
    assert names(page) == [] and fits(page)


def test_search_and_orders(page: Page, server: Serving) -> None:
    searcher = Searcher(server.index, server.predictor)
    reranked, dual = (
        [hit.id for hit in searcher.search(Query("a red circle", k=24, rerank=rerank))] for rerank in (None, 0)
    )
    search(page, "a red circle")
    assert names(page) == reranked and len(reranked) == PICTURES
    assert "q=a+red+circle" in page.url
    assert page.eval_on_selector("#grid img", "image => image.naturalWidth") == 64
    page.check("[name=order][value=compare]", force=True)
    page.wait_for_selector("#compare .hit")
    assert names(page, "#dual") == dual and names(page, "#reranked") == reranked
    page.reload()
    page.wait_for_selector("#grid .hit")
    assert page.input_value("#text") == "a red circle"


def test_a_dropped_picture_and_more_like_this(page: Page) -> None:
    drop(page)
    assert len(names(page)) == PICTURES and page.is_visible("#chip-image")
    assert page.is_hidden("#order")  # without words there is nothing to re-rank by
    chosen = names(page)[3]
    page.click("#grid .hit >> nth=3")
    page.click("#like")
    page.wait_for_function("id => location.search.includes(id)", arg=chosen)
    page.wait_for_function("count => document.querySelectorAll('#grid .hit').length === count", arg=PICTURES - 1)
    assert chosen not in names(page)
    page.go_back()
    page.click("#text")


def test_question_and_heatmap(page: Page, server: Serving) -> None:
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
    pixels = "heat => heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data.some(value => value)"
    assert page.is_visible("#heat") and page.eval_on_selector("#heat", pixels)


def test_by_keyboard_alone(page: Page) -> None:
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
    with opened(browser, server.url, 360, 740) as page:
        for act in (search, compare, lambda page: page.click("#dual .hit >> nth=0")):
            act(page)
            assert fits(page)
        assert page.is_visible("#close")


def test_an_empty_index(browser: Browser, model_folder: Path, tmp_path: Path) -> None:
    predictor = tercet.load(model_folder)
    digest, embed_dim = model_digest(predictor.model), predictor.model.config.embed_dim
    index = Index.create(str(tmp_path / "index"), str(model_folder), digest, embed_dim)
    with serving(index, predictor, ServeSettings(port=0)) as running, opened(browser, running.url) as page:
        assert "holds no pictures yet" in page.inner_text("#hint")
        enter(page, "#text", "a red circle")
        page.wait_for_function("() => document.querySelector('#hint').textContent.includes('Nothing was found')")


def test_an_index_that_breaks_and_a_server_that_goes(
    browser: Browser, index_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(index_folder, tmp_path / "index")
    with ExitStack() as pages:
        with serving(Index.open(str(copy)), tercet.load(model_folder), ServeSettings(port=0)) as running:
            page = pages.enter_context(opened(browser, running.url, fails=True))
            page.wait_for_selector("#newest .hit")
            shutil.rmtree(copy)
            search(page)
            message = page.inner_text("#notice-text")
            assert "The index cannot be read at present" in message and str(tmp_path) not in message
            assert running.client.get("/readyz").status_code == 503
            shutil.copytree(index_folder, copy)
            page.click("#again")
            page.wait_for_selector("#grid .hit")
        enter(page, "#text", "a blue star")
        page.wait_for_selector("#notice:not([hidden])")
        assert "does not answer" in page.inner_text("#notice-text")


def test_a_key_is_asked_for_once(browser: Browser, serve: Callable[..., Serving]) -> None:
    page = browser.new_context().new_page()
    page.goto(serve(key="correct-horse-battery").url)
    enter(page, "#key-text", "wrong-horse-battery")
    page.wait_for_selector("#key:not([hidden])")
    enter(page, "#key-text", "correct-horse-battery")
    page.wait_for_selector("#about:not(:empty)", state="attached")
    search(page)
    page.wait_for_function("() => document.querySelector('#grid img').naturalWidth === 64")
    assert (page.get_attribute("#grid img >> nth=0", "src") or "").startswith("blob:")
