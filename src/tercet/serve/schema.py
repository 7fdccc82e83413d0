"""The JSON of requests and responses, from which FastAPI makes the OpenAPI description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

TEXT_LENGTH = 1000  # characters of one text; the model reads the first few dozen words
ID_LENGTH = 512
TEXTS = 64  # texts, labels or answers of one request
IMAGES = 16  # images of one request
RESULTS = 200  # of one search
RERANK = 200  # candidates of one search that the fusion encoder re-ranks


def _check_characters(text: str) -> str:
    """Refuse characters that no text holds, and that cannot be written back as UTF-8."""
    if "\0" in text:
        raise ValueError("holds a null character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone \\ud800 to \\udfff escape); send whole ones")
    return text


Characters = AfterValidator(_check_characters)
Text = Annotated[str, Field(min_length=1, max_length=TEXT_LENGTH), Characters]
Texts = Annotated[list[Text], Field(max_length=TEXTS)]
Identifier = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), Characters]
Filter = Annotated[str, Field(min_length=1, max_length=2000), Characters]


class Body(BaseModel):
    """A request.  Unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ImageInput(Body):
    """An image: one of the index by its id, or a file's bytes (JPEG, PNG, WebP, ...) in base64."""

    id: Identifier | None = Field(default=None, description="id of an image of the index")
    base64: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="a file's bytes in base64")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.id is None) == (self.base64 is None):
            raise ValueError("give either id or base64")
        return self


class SearchRequest(Body):
    """What to look for: a text, an image, or both."""

    text: Text | None = Field(default=None, description="what the image shows")
    image: ImageInput | None = Field(default=None, description="an image that it looks like")
    without: Text | None = Field(default=None, description="what the image does not show")
    where: Filter | None = Field(
        default=None, description="a filter over the columns of the index, as in: width >= 800 and caption like '%dog%'"
    )
    k: int = Field(default=20, ge=1, le=RESULTS, description="results")
    rerank: int | None = Field(
        default=None,
        ge=0,
        le=RERANK,
        description="candidates that the fusion encoder re-ranks, where there is a text; 0: none",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text is None and self.image is None:
            raise ValueError("give text, image or both")
        return self


class ListedImage(BaseModel):
    """An image of the index."""

    id: str
    name: str = Field(description="the last part of the URI")
    uri: str | None = Field(description="where the image is; null unless the server was started with --show-uris")
    caption: str | None
    width: int
    height: int


class Hit(ListedImage):
    """An image that was found."""

    cosine: float = Field(description="similarity by the dual encoder, -1 to 1")
    match: float | None = Field(description="probability of a match by the fusion encoder; null: not re-ranked")
    dual_rank: int = Field(description="rank by the dual encoder alone, from 1")


class ImageList(BaseModel):
    """Images of the index, the last indexed first."""

    images: list[ListedImage]


class SearchResponse(BaseModel):
    """Images, the best first."""

    hits: list[Hit]
    seconds: float = Field(description="from the request's arrival to its answer")


class MatchRequest(Body):
    """An image and texts that may fit it."""

    image: ImageInput
    texts: Annotated[list[Text], Field(min_length=1, max_length=TEXTS)]


class TextMatch(BaseModel):
    """How well a text fits the image."""

    text: str
    match: float = Field(description="probability that they belong together, by the fusion encoder")
    cosine: float = Field(description="similarity by the dual encoder, -1 to 1")


class MatchResponse(BaseModel):
    """The texts in the order of the request."""

    matches: list[TextMatch]


class AskRequest(Body):
    """A question about an image."""

    image: ImageInput
    question: Text
    answers: Texts = Field(default=[], description="what to choose from; default: the model's own list, or free text")


class Scored(BaseModel):
    """A text with its probability."""

    text: str
    score: float


class AskResponse(BaseModel):
    """The answer, its score, and the next best."""

    answer: str
    score: float
    others: list[Scored]


class ClassifyRequest(Body):
    """An image and the labels to choose from."""

    image: ImageInput
    labels: Annotated[list[Text], Field(min_length=1, max_length=TEXTS)]
    templates: Annotated[list[Text], Field(max_length=8)] = Field(
        default=[], description="sentences with {} where the label goes"
    )


class ClassifyResponse(BaseModel):
    """The labels, the most probable first."""

    labels: list[Scored]


class ExplainRequest(Body):
    """An image and a text to find in it."""

    image: ImageInput
    text: Text
    answer: bool = Field(
        default=False, description="the text is a question: show what its answer rests on, by the model that answers"
    )


class WordMap(BaseModel):
    """Where a word is seen."""

    word: str
    heatmap: list[list[float]] = Field(description="rows of patches over the whole image, from 0 up")
    strength: float = Field(description="its greatest heat as a share of the greatest of all words, 0 to 1")


class ExplainResponse(BaseModel):
    """Heatmaps of a text and of its words, by gradient-weighted cross-attention."""

    text: str
    match: float = Field(description="probability that image and text belong together")
    answer: str | None = Field(default=None, description="the answer that is explained, if the text is a question")
    heatmap: list[list[float]] = Field(description="the mean over the words")
    words: list[WordMap]


class EmbedRequest(Body):
    """Images and texts to embed."""

    images: Annotated[list[ImageInput], Field(max_length=IMAGES)] = Field(default=[])
    texts: Texts = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.images and not self.texts:
            raise ValueError("give images, texts or both")
        return self


class EmbedResponse(BaseModel):
    """Unit vectors of the space that images and texts share."""

    image_feats: list[list[float]]
    text_feats: list[list[float]]


class About(BaseModel):
    """What this server holds and allows."""

    version: str
    images: int
    embed_dim: int
    answers_questions: bool
    text_length: int
    body_bytes: int
    pixel_limit: int


class State(BaseModel):
    """Whether the server is alive or ready."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="a word for programs")
    message: str = Field(description="what is wrong, and how to fix it")


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


def describe_validation(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors in one line that names the key, without what was sent."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    if first["type"] == "json_invalid":
        return f"the body is not JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})"
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{more}"
