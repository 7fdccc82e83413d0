"""The application: what each endpoint takes and returns."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from tercet.data.augment import Pixels
from tercet.data.images import decode, resize
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search import search as searching
from tercet.search.index import Entry, Hit, Index
from tercet.search.search import Searcher
from tercet.serve import schema
from tercet.serve.batching import Batcher, BatcherClosedError, Call
from tercet.serve.limits import ERRORS, Guard, Metrics, ServeSettings, error_response
from tercet.version import __version__

log = logging.getLogger("tercet.serve")

Result = TypeVar("Result")

STATIC = Path(__file__).parent / "static"
DECODERS = 2  # images decoded at a time: each takes 3 bytes a pixel and a core
READERS = 8  # reads of the index at a time
# How files begin that every browser shows; any other is shown as a JPEG.
BROWSER_FORMATS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}


class Service:
    """What the endpoints share: the index, the thread that owns the models, and the limits.

    Attributes:
        predictor: searches, matches, classifies, embeds and explains.
        answering: answers questions.
        index: the images.
        searcher: over the index, with `predictor`.
        settings: the limits.
        metrics: of this server.
        batcher: runs the models.
    """

    def __init__(
        self, predictor: Predictor, index: Index, settings: ServeSettings, answering: Predictor | None = None
    ) -> None:
        self.predictor, self.answering = predictor, answering or predictor
        self.index, self.searcher, self.settings = index, Searcher(index, predictor), settings
        self.metrics = Metrics()
        self.batcher = Batcher(settings.batch, settings.window, self.metrics.observe_batch)
        self._decoders, self._readers = anyio.CapacityLimiter(DECODERS), anyio.CapacityLimiter(READERS)

    async def infer(self, call: Call, *arguments: Any, shared: tuple[Hashable, ...] = (), cost: int = 1) -> Any:
        """The result of `call` for one job, run in a batch with other requests; see `Batcher.submit`."""
        try:
            future = self.batcher.submit(call, arguments, shared, cost)
        except BatcherClosedError:
            message = "the server is stopping; ask again when it is back"
            raise HTTPException(503, message, {"retry-after": "5"}) from None
        return await asyncio.wrap_future(future)

    async def read(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """A read of the index, beside the event loop."""
        return await run_sync(call, *arguments, limiter=self._readers)

    async def image(self, image: schema.ImageInput, predictor: Predictor | None = None) -> Pixels:
        """The image of a request as the model sees it, uint8 `[size, size, 3]`; decoded beside the event loop."""
        size = (predictor or self.predictor).model.config.vision.image_size
        return await run_sync(self._decode, image, size, limiter=self._decoders)

    def original(self, image_id: str) -> bytes:
        """The file of an image of the index.

        Raises:
            HTTPException: no image of that id, or its file cannot be read any more.
        """
        self.require(image_id)
        try:
            return self.index.image(image_id)
        except TercetError as error:
            # The message names a path, which is the server's own business.
            log.warning("image %s cannot be served: %s", image_id, error)
            raise HTTPException(404, "the file of this image cannot be read; run `tercet index` again") from error

    def thumbnail(self, image_id: str) -> bytes:
        """The thumbnail of an image of the index.

        Raises:
            HTTPException: no image of that id.
        """
        self.require(image_id)
        return self.index.thumbnail(image_id)

    def require(self, image_id: str) -> None:
        """Refuse an id that the index does not hold.

        Raises:
            HTTPException: no image of that id.
        """
        if not self.index.rows([image_id], ["id"]):
            raise HTTPException(404, "the index holds no image of that id; ids come with the results of a search")

    def listed(self, image: Entry) -> dict[str, Any]:
        """What clients may know of an image of the index."""
        return {
            "id": image.id,
            "name": image.uri.rpartition("#" if "#" in image.uri else "/")[2],
            "uri": image.uri if self.settings.show_uris else None,
            "caption": image.caption,
            "width": image.width,
            "height": image.height,
        }

    def _decode(self, image: schema.ImageInput, size: int) -> Pixels:
        if image.id is not None:
            return resize(decode(self.original(image.id), "the image of the index"), size)
        assert image.base64 is not None
        _, comma, rest = image.base64.partition(",")
        encoded = rest if comma and image.base64.startswith("data:") else image.base64
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise TercetError("image.base64 is not base64; send a file's bytes, encoded without line breaks") from error
        return resize(decode(data, "image.base64", self.settings.pixel_limit), size)


def create_app(
    predictor: Predictor, index: Index, settings: ServeSettings, answering: Predictor | None = None
) -> FastAPI:
    """The application over a model and its index.

    Args:
        predictor: on its device, with its tokenizer.
        index: embedded by the same model.
        settings: the limits.
        answering: fine-tuned for questions; default `predictor`.
    """
    service = Service(predictor, index, settings, answering)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_sync(service.batcher.close, settings.request_seconds)

    # The usual pages of documentation load scripts from elsewhere; /openapi.json is all there is.
    app = FastAPI(
        title="Tercet",
        version=__version__,
        description="Search images by text and by image, ask about them, and see why.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC))
    for kind in (TercetError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle_error)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    if settings.origins:
        # Around the guard, so that pages of allowed origins can read its errors.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        errors = list(error.errors())
        status = 400 if errors[0]["type"] == "json_invalid" else 422
        return error_response(HTTPException(status, schema.describe_validation(errors)))
    if isinstance(error, TercetError):
        if request.app.state.service.index.path in str(error):
            # Not the client's mistake, and where the index is, is none of its business.
            log.error("%s", error)
            message = "the index cannot be read at present; the server's log says why"
            return error_response(HTTPException(503, message, {"retry-after": "5"}))
        return error_response(HTTPException(422, str(error)))
    assert isinstance(error, HTTPException)
    if error.detail in ("Not Found", "Method Not Allowed"):  # Starlette's own, of a path or method without a route
        messages = {
            404: "no such endpoint; /openapi.json lists them",
            405: f"this endpoint does not take {request.method}; /openapi.json lists what it takes",
        }
        error = HTTPException(error.status_code, messages[error.status_code], error.headers)
    return error_response(error)


def _get_service(request: Request) -> Service:
    return request.app.state.service


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorResponse, "description": ERRORS[status][1]} for status in statuses}


router = APIRouter()
TheService = Annotated[Service, Depends(_get_service)]
Limit = Annotated[int, Query(ge=1, le=schema.RESULTS, description="how many at most")]
ImageId = Annotated[str, PathParameter(min_length=1, max_length=schema.ID_LENGTH, description="of an indexed image")]
POST_ERRORS = _errors(400, 401, 404, 408, 413, 415, 421, 422, 429, 500, 503)
GET_ERRORS = _errors(401, 421, 422, 500, 503)
IMAGE_TYPES = {"schema": {"type": "string", "format": "binary"}}
IMAGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_errors(401, 404, 421, 422, 500, 503),
    200: {
        "description": "the image",
        "content": {f"image/{kind}": IMAGE_TYPES for kind in ("jpeg", "png", "gif", "webp")},
    },
}


@router.post("/v1/search", responses=POST_ERRORS)
async def search(body: schema.SearchRequest, service: TheService) -> schema.SearchResponse:
    """Find images by text, by an image, or by both."""
    started = time.perf_counter()
    image = like = None
    if body.image is not None and body.image.id is not None:
        like = body.image.id
        await service.read(service.require, like)
    elif body.image is not None:
        image = Image.fromarray(await service.image(body.image))
    query = searching.Query(body.text, image, like, body.without, body.where, body.k, body.rerank)
    hits: list[Hit] = await service.infer(service.searcher.search_many, query)
    scored = [
        schema.Hit(**service.listed(hit), cosine=hit.cosine, match=hit.match, dual_rank=hit.dual_rank) for hit in hits
    ]
    return schema.SearchResponse(hits=scored, seconds=time.perf_counter() - started)


@router.post("/v1/match", responses=POST_ERRORS)
async def match(body: schema.MatchRequest, service: TheService) -> schema.MatchResponse:
    """How well texts fit an image."""
    image = await service.image(body.image)
    scores = await service.infer(service.predictor.match_each, image, body.texts, cost=len(body.texts))
    matches = [
        schema.TextMatch(text=text, match=score.match, cosine=score.cosine)
        for text, score in zip(body.texts, scores, strict=True)
    ]
    return schema.MatchResponse(matches=matches)


@router.post("/v1/ask", responses=POST_ERRORS)
async def ask(body: schema.AskRequest, service: TheService) -> schema.AskResponse:
    """Answer a question about an image."""
    answering = service.answering
    answering.model.require_heads(("answer",), "vqa")
    image = await service.image(body.image, answering)
    choices = tuple(body.answers) or None
    answer = await service.infer(answering.answer, image, body.question, shared=(choices,))
    others = [schema.Scored(text=text, score=score) for text, score in answer.others]
    return schema.AskResponse(answer=answer.text, score=answer.score, others=others)


@router.post("/v1/classify", responses=POST_ERRORS)
async def classify(body: schema.ClassifyRequest, service: TheService) -> schema.ClassifyResponse:
    """Choose the label that fits an image best."""
    image = await service.image(body.image)
    shared = (tuple(body.labels), tuple(body.templates))
    scores = await service.infer(service.predictor.classify, image, shared=shared)
    return schema.ClassifyResponse(labels=[schema.Scored(text=text, score=score) for text, score in scores.items()])


@router.post("/v1/explain", responses=POST_ERRORS)
async def explain(body: schema.ExplainRequest, service: TheService) -> schema.ExplainResponse:
    """Where in an image each word of a text is seen, or each word of a question for its answer."""
    predictor = service.answering if body.answer else service.predictor
    if body.answer:
        predictor.model.require_heads(("answer",), "vqa")
    image = await service.image(body.image, predictor)
    shared = (None, "answer" if body.answer else "itm")
    found = await service.infer(predictor.explain, image, body.text, shared=shared, cost=2)
    words = [
        schema.WordMap(word=heat.word, heatmap=heat.heatmap.tolist(), strength=heat.strength) for heat in found.words
    ]
    return schema.ExplainResponse(
        text=body.text, match=found.match, answer=found.answer, heatmap=found.heatmap.tolist(), words=words
    )


@router.post("/v1/embed", responses=POST_ERRORS)
async def embed(body: schema.EmbedRequest, service: TheService) -> schema.EmbedResponse:
    """Unit vectors of images and texts."""
    images = [await service.image(image) for image in body.images]
    predictor = service.predictor
    image_feats = await asyncio.gather(*(service.infer(predictor.embed_images, image) for image in images))
    text_feats = await asyncio.gather(*(service.infer(predictor.embed_texts, text) for text in body.texts))
    return schema.EmbedResponse(
        image_feats=[feats.tolist() for feats in image_feats], text_feats=[feats.tolist() for feats in text_feats]
    )


@router.get("/v1/images", responses=GET_ERRORS)
async def images(service: TheService, limit: Limit = 24) -> schema.ImageList:
    """The images that were indexed last."""
    entries = await service.read(service.index.newest, limit)
    return schema.ImageList(images=[schema.ListedImage(**service.listed(entry)) for entry in entries])


@router.get("/v1/images/{id}", responses=IMAGE_RESPONSES, response_class=Response)
async def image(id: ImageId, service: TheService) -> Response:
    """An image as it was indexed."""
    return await service.read(lambda: _image_response(service.original(id)))


@router.get("/v1/thumbnails/{id}", responses=IMAGE_RESPONSES, response_class=Response)
async def thumbnail(id: ImageId, service: TheService) -> Response:
    """A small version of an image."""
    return await service.read(lambda: _image_response(service.thumbnail(id)))


@router.get("/v1/about", responses=GET_ERRORS)
async def about(service: TheService) -> schema.About:
    """What this server holds and allows."""
    return schema.About(
        version=__version__,
        images=await service.read(lambda: service.index.count),
        embed_dim=service.index.embed_dim,
        answers_questions=service.answering.answers_questions,
        text_length=schema.TEXT_LENGTH,
        body_bytes=service.settings.body_bytes,
        pixel_limit=service.settings.pixel_limit,
    )


@router.get("/healthz", responses=_errors(421, 500))
async def healthz() -> schema.State:
    """Whether the process answers."""
    return schema.State(status="alive")


@router.get("/readyz", responses=_errors(421, 500, 503))
async def readyz(service: TheService) -> schema.State:
    """Whether the index can be read and the model takes requests."""
    if not service.batcher.alive:
        raise HTTPException(503, "the model takes no requests; the server is stopping or must be started again")
    # Counting would be answered from memory; looking up an id reads the table.
    await service.read(service.index.rows, ["0" * 16], ["id"])
    return schema.State(status="ready")


@router.get("/metrics", include_in_schema=False)
async def metrics(service: TheService) -> Response:
    """What Prometheus reads."""
    service.metrics.images.set(await service.read(lambda: service.index.count))
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return FileResponse(STATIC / "index.html")


def _image_response(data: bytes) -> Response:
    """A file that browsers show as it is; a TIFF and its like become a JPEG."""
    kind = next((kind for start, kind in BROWSER_FORMATS.items() if data.startswith(start)), None)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        stream = io.BytesIO()
        Image.fromarray(decode(data, "the image of the index")).save(stream, "JPEG", quality=92)
        data, kind = stream.getvalue(), "image/jpeg"
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})
