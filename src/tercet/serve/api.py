"""The application: what each address takes and gives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import FastAPI, Path, Request, Response
from fastapi import Query as QueryParameter
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tercet.data.augment import Pixels
from tercet.errors import TercetError
from tercet.search.index import Hit
from tercet.search.search import Query, Searcher
from tercet.serve import schema
from tercet.serve.batching import Batcher, BatcherClosedError
from tercet.serve.guard import Guard
from tercet.serve.metrics import Metrics
from tercet.serve.page import PageFile, read_page
from tercet.serve.pictures import original, read_picture, require, shown
from tercet.serve.refusals import Refusal, error_body
from tercet.serve.settings import RESULTS, ServeSettings
from tercet.version import __version__

if TYPE_CHECKING:
    from tercet.predictor import Predictor
    from tercet.search.index import Entry, Index

log = logging.getLogger("tercet.serve")

Result = TypeVar("Result")
Limit = Annotated[int, QueryParameter(ge=1, le=RESULTS, description="how many at most")]
Identifier = Annotated[str, Path(min_length=1, max_length=schema.ID_LENGTH, description="id of an image of the index")]

DECODERS = 2  # images that are decoded at once: each takes 3 bytes a pixel and a core
READERS = 8  # reads of the index at once
_MEANINGS = {
    400: "not HTTP or not JSON",
    401: "no key, or not the right one",
    404: "no image of that id",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
    421: "addressed to another name",
    422: "a value that does not hold",
    429: "too many requests wait",
    500: "a fault of the server",
    503: "not ready, stopping, or no answer in time",
}
IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


READ_FAULTS = _faults(401, 421, 500, 503)
POST_FAULTS = _faults(400, 401, 404, 408, 413, 415, 421, 422, 429, 500, 503)
LIST_FAULTS = _faults(401, 421, 422, 500, 503)
IMAGE_FAULTS = _faults(401, 404, 421, 422, 500, 503)


class Service:
    """What the addresses share: the index, the thread that owns the models, and the limits.

    Attributes:
        predictor: searches, matches, classifies, embeds and explains.
        answering: answers questions.
        index: the images.
        settings: the bounds.
        metrics: what is counted.
    """

    def __init__(
        self, predictor: Predictor, index: Index, settings: ServeSettings, answering: Predictor | None = None
    ) -> None:
        self.predictor, self.answering = predictor, answering or predictor
        self.index, self.settings, self.metrics = index, settings, Metrics()
        self.searcher = Searcher(index, predictor)
        self._batcher = Batcher(self.run, settings.batch, settings.window, self.metrics.observe_batch)
        self._decoders = anyio.CapacityLimiter(DECODERS)
        self._readers = anyio.CapacityLimiter(READERS)

    @property
    def ready(self) -> bool:
        """Whether the model takes jobs."""
        return self._batcher.alive

    def run(self, kind: Hashable, jobs: list[Any]) -> Any:
        """Results of `jobs` in order; `kind` is a name and what all its jobs share.  Called by the batcher's thread."""
        assert isinstance(kind, tuple)
        name, *shared = kind
        if name == "search":
            return self.searcher.search_many(jobs)
        if name == "embed_images":
            return self.predictor.embed_images(jobs).tolist()
        if name == "embed_texts":
            return self.predictor.embed_texts(jobs).tolist()
        pixels = [job[0] for job in jobs]
        if name == "classify":
            return self.predictor.classify(pixels, *shared)
        asked = [job[1] for job in jobs]
        if name == "match":
            return self.predictor.match_each(pixels, asked)
        if name == "ask":
            return self.answering.answer(pixels, asked, *shared)
        assert name == "explain"
        (mode,) = shared
        return (self.answering if mode == "answer" else self.predictor).explain(pixels, asked, mode=mode)

    async def infer(self, kind: Hashable, job: Any, cost: int = 1) -> Any:
        """The model's result of a job, by the next batch of its kind."""
        try:
            future = self._batcher.submit(kind, job, cost)
        except BatcherClosedError:
            raise Refusal(503, "the server is stopping; ask again when it is back", {"retry-after": "5"}) from None
        return await asyncio.wrap_future(future)

    async def picture(self, picture: schema.Picture, reader: Predictor | None = None) -> Pixels:
        """The image of a request at the size that `reader` sees, by default `predictor`; decoded in a thread."""
        size = (reader or self.predictor).model.config.vision.image_size
        arguments = (picture, self.index, size, self.settings.pixel_limit)
        return await run_sync(read_picture, *arguments, limiter=self._decoders)

    async def read(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """A read of the index, beside the event loop."""
        return await run_sync(call, *arguments, limiter=self._readers)

    async def close(self) -> None:
        """Finish the jobs that wait and end the thread."""
        await run_sync(self._batcher.close, self.settings.request_seconds)


def create_app(
    predictor: Predictor, index: Index, settings: ServeSettings, answering: Predictor | None = None
) -> FastAPI:
    """The application over a model and its index.

    Args:
        predictor: on the device that it is to run on, with its tokenizer.
        index: embedded by the same model.
        settings: the bounds.
        answering: fine-tuned for questions, on its device; default `predictor`.
    """
    service = Service(predictor, index, settings, answering)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    # The usual pages of documentation load scripts from elsewhere; /openapi.json is all there is.
    app = FastAPI(
        title="Tercet",
        version=__version__,
        description="Search images by words and by image, ask about them, and see why.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    _add_errors(app, index.path)
    _add_questions(app, service)
    _add_explanations(app, service)
    _add_images(app, service)
    _add_health(app, service)
    _add_page(app, read_page())
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    if settings.origins:
        # Around the guard, so that refusals can be read by the pages that are allowed.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _add_errors(app: FastAPI, index_path: str) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _error(error.status, error.message, error.headers)

    async def tell_mistake(_: Request, error: Exception) -> Response:
        if index_path in str(error):
            # No mistake of the client's, and where the index lies is none of its business.
            log.error("%s", error)
            return _error(503, "the index cannot be read at present; the server's log says why", {"retry-after": "5"})
        return _error(422, str(error))

    async def tell_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = list(error.errors())
        return _error(400 if errors[0]["type"] == "json_invalid" else 422, schema.tell_validation(errors))

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: "nothing at this address; /openapi.json lists what there is",
            405: f"{request.method} is not for this address; /openapi.json tells which method is",
        }
        message = messages.get(error.status_code, str(error.detail))
        return _error(error.status_code, message, dict(error.headers or {}))

    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(TercetError, tell_mistake)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_exception_handler(HTTPException, tell_http)


def _add_questions(app: FastAPI, service: Service) -> None:
    """The addresses that the model answers."""

    @app.post("/v1/search", responses=POST_FAULTS, operation_id="search")
    async def search(body: schema.SearchRequest) -> schema.SearchResponse:
        """Find images by words, by an image, or by both."""
        started = time.perf_counter()
        image = like = None
        if body.image is not None and body.image.id is not None:
            like = body.image.id
            await service.read(require, service.index, like)
        elif body.image is not None:
            image = Image.fromarray(await service.picture(body.image))
        query = Query(body.text, image, like, body.without, body.where, body.k, body.rerank)
        hits = await service.infer(("search",), query)
        return schema.SearchResponse(
            hits=[_hit(hit, service.settings.show_uris) for hit in hits], seconds=time.perf_counter() - started
        )

    @app.post("/v1/match", responses=POST_FAULTS, operation_id="match")
    async def match(body: schema.MatchRequest) -> schema.MatchResponse:
        """How well texts fit an image."""
        job = (await service.picture(body.image), body.texts)
        results = await service.infer(("match",), job, cost=len(body.texts))
        matches = [
            schema.TextMatch(text=text, match=result.match, cosine=result.cosine)
            for text, result in zip(body.texts, results, strict=True)
        ]
        return schema.MatchResponse(matches=matches)

    @app.post("/v1/ask", responses=POST_FAULTS, operation_id="ask")
    async def ask(body: schema.AskRequest) -> schema.AskResponse:
        """Answer a question about an image."""
        service.answering.model.require_heads(("answer",), "vqa")
        job = (await service.picture(body.image, service.answering), body.question)
        answer = await service.infer(("ask", tuple(body.answers) or None), job)
        others = [schema.Scored(text=text, score=score) for text, score in answer.others]
        return schema.AskResponse(answer=answer.text, score=answer.score, others=others)

    @app.post("/v1/classify", responses=POST_FAULTS, operation_id="classify")
    async def classify(body: schema.ClassifyRequest) -> schema.ClassifyResponse:
        """Choose the label that fits an image best."""
        job = (await service.picture(body.image),)
        scores = await service.infer(("classify", tuple(body.labels), tuple(body.templates)), job)
        return schema.ClassifyResponse(labels=[schema.Scored(text=text, score=score) for text, score in scores.items()])

    @app.post("/v1/embed", responses=POST_FAULTS, operation_id="embed")
    async def embed(body: schema.EmbedRequest) -> schema.EmbedResponse:
        """Unit vectors of images and texts."""
        pixels = [await service.picture(picture) for picture in body.images]
        images = await asyncio.gather(*(service.infer(("embed_images",), own) for own in pixels))
        texts = await asyncio.gather(*(service.infer(("embed_texts",), text) for text in body.texts))
        return schema.EmbedResponse(image_feats=images, text_feats=texts)


def _add_explanations(app: FastAPI, service: Service) -> None:
    """The address that tells where words are seen."""

    @app.post("/v1/explain", responses=POST_FAULTS, operation_id="explain")
    async def explain(body: schema.ExplainRequest) -> schema.ExplainResponse:
        """Where in an image each word of a text is seen, or each of a question for its answer."""
        reader = None
        if body.answer:
            reader = service.answering
            reader.model.require_heads(("answer",), "vqa")
        job = (await service.picture(body.image, reader), body.text)
        found = await service.infer(("explain", "answer" if body.answer else "itm"), job, cost=2)
        words = [
            schema.WordMap(word=heat.word, heatmap=heat.heatmap.tolist(), strength=heat.strength)
            for heat in found.words
        ]
        return schema.ExplainResponse(
            text=body.text, match=found.match, answer=found.answer, heatmap=found.heatmap.tolist(), words=words
        )


def _add_images(app: FastAPI, service: Service) -> None:
    """The images of the index, by id."""
    shape = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES}
    responses: dict[int | str, dict[str, Any]] = {**IMAGE_FAULTS, 200: {"description": "the image", "content": shape}}

    @app.get("/v1/images", responses=LIST_FAULTS, operation_id="images")
    async def images(limit: Limit = 24) -> schema.ImageList:
        """The images that were indexed last."""
        entries = await service.read(service.index.newest, limit)
        return schema.ImageList(
            images=[schema.Listed(**_known(entry, service.settings.show_uris)) for entry in entries]
        )

    @app.get("/v1/images/{id}", responses=responses, response_class=Response, operation_id="image")
    async def image(id: Identifier) -> Response:
        """An image as it was indexed."""
        data, kind = await service.read(lambda: shown(original(service.index, id)))
        return _image(data, kind)

    @app.get("/v1/thumbnails/{id}", responses=responses, response_class=Response, operation_id="thumbnail")
    async def thumbnail(id: Identifier) -> Response:
        """A small picture of an image."""

        def read() -> tuple[bytes, str]:
            require(service.index, id)
            return shown(service.index.thumbnail(id))

        return _image(*await service.read(read))


def _add_health(app: FastAPI, service: Service) -> None:
    """What tells that the server lives, and how it does."""

    @app.get("/v1/about", responses=READ_FAULTS, operation_id="about")
    async def about() -> schema.About:
        """What this server holds and allows."""
        return schema.About(
            version=__version__,
            images=await service.read(lambda: service.index.count),
            embed_dim=service.predictor.model.config.embed_dim,
            answers_questions=service.answering.answers_questions,
            text_length=schema.TEXT_LENGTH,
            body_bytes=service.settings.body_bytes,
            pixel_limit=service.settings.pixel_limit,
        )

    @app.get("/healthz", responses=_faults(421, 500), operation_id="healthz")
    async def healthz() -> schema.State:
        """Whether the process answers."""
        return schema.State(status="alive")

    @app.get("/readyz", responses=_faults(421, 500, 503), operation_id="readyz")
    async def readyz() -> schema.State:
        """Whether the index can be read and the model takes requests."""
        if not service.ready:
            raise Refusal(503, "the model takes no requests; the server is stopping or must be started again")
        # Counting would be answered from memory; looking an id up reads the table.
        await service.read(service.index.rows, ["0" * 16], ["id"])
        return schema.State(status="ready")

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        """What Prometheus reads."""
        service.metrics.images.set(await service.read(lambda: service.index.count))
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, page: dict[str, PageFile]) -> None:
    """The page and its files."""

    def answer(name: str, request: Request) -> Response:
        if name not in page:
            raise HTTPException(404)
        file = page[name]
        headers = {"etag": file.tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return answer("index.html", request)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return answer(name, request)


def _hit(hit: Hit, show_uris: bool) -> schema.Hit:
    return schema.Hit(**_known(hit, show_uris), cosine=hit.cosine, match=hit.match, dual_rank=hit.dual_rank)


def _known(image: Hit | Entry, show_uris: bool) -> dict[str, Any]:
    """What clients may know of an image of the index."""
    return {
        "id": image.id,
        "name": image.uri.rpartition("#" if "#" in image.uri else "/")[2],
        "uri": image.uri if show_uris else None,
        "caption": image.caption,
        "width": image.width,
        "height": image.height,
    }


def _image(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(status, message), status, headers, media_type="application/json")
