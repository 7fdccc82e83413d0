"""The JSON of requests and responses; FastAPI makes the OpenAPI description of them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tercet.serve.settings import IMAGES, RERANK, RESULTS, TEXT_LENGTH, TEXTS

ID_LENGTH = 512
_HALVES = range(0xD800, 0xE000)


def _whole(text: str) -> str:
    """Refuse what no text of people holds, and what could not be written back as UTF-8."""
    if "\0" in text:
        raise ValueError("holds a null character; leave it out")
    if any(ord(character) in _HALVES for character in text):
        raise ValueError("holds half a character (a lone \\ud800 to \\udfff escape); send whole ones")
    return text


Text = Annotated[str, Field(min_length=1, max_length=TEXT_LENGTH), AfterValidator(_whole)]
Identifier = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), AfterValidator(_whole)]


class Body(BaseModel):
    """A request; a key that is not known is a mistake, and so is a number that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Picture(Body):
    """An image: one of the index by its id, or a file's bytes (JPEG, PNG, WebP, ...) in base64."""

    id: Identifier | None = Field(default=None, description="id of an image of the index")
    base64: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="a file's bytes in base64")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.id is None) == (self.base64 is None):
            raise ValueError("give either id or base64")
        return self


class SearchRequest(Body):
    """What to look for: words, an image, or both."""

    text: Text | None = Field(default=None, description="words")
    image: Picture | None = Field(default=None, description="an image whose like is sought")
    without: Text | None = Field(default=None, description="words for what should not be seen")
    where: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_whole)] | None = Field(
        default=None, description="a filter over the columns of the index, as in: width >= 800 and caption like '%dog%'"
    )
    k: int = Field(default=20, ge=1, le=RESULTS, description="results")
    rerank: int | None = Field(
        default=None,
        ge=0,
        le=RERANK,
        description="candidates that the fusion encoder ranks anew, where there are words; 0: none",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.text is None and self.image is None:
            raise ValueError("give text, image or both")
        return self


class Listed(BaseModel):
    """An image of the index."""

    id: str
    name: str = Field(description="the last part of the URI")
    uri: str | None = Field(description="where the image lies; null unless the server was started with --show_uris")
    caption: str | None
    width: int
    height: int


class Hit(Listed):
    """An image that was found."""

    cosine: float = Field(description="similarity by the dual encoder, -1 to 1")
    match: float | None = Field(description="probability of a match by the fusion encoder; null: not re-ranked")
    dual_rank: int = Field(description="place in the dual encoder's own order, from 1")


class ImageList(BaseModel):
    """Images of the index, those indexed last first."""

    images: list[Listed]


class SearchResponse(BaseModel):
    """Images, the best first."""

    hits: list[Hit]
    seconds: float = Field(description="from the request's arrival to its answer")


class MatchRequest(Body):
    """An image and texts that may fit it."""

    image: Picture
    texts: Annotated[list[Text], Field(min_length=1, max_length=TEXTS)]


class TextMatch(BaseModel):
    """How a text fits the image."""

    text: str
    match: float = Field(description="probability that they belong together, by the fusion encoder")
    cosine: float = Field(description="similarity by the dual encoder, -1 to 1")


class MatchResponse(BaseModel):
    """The texts in the order of the request."""

    matches: list[TextMatch]


class AskRequest(Body):
    """A question about an image."""

    image: Picture
    question: Text
    answers: Annotated[list[Text], Field(max_length=TEXTS)] = Field(
        default=[], description="what to choose from; default: the model's own list, or else it writes freely"
    )


class Scored(BaseModel):
    """A word or sentence with its probability."""

    text: str
    score: float


class AskResponse(BaseModel):
    """The answer, its score, and the next best."""

    answer: str
    score: float
    others: list[Scored]


class ClassifyRequest(Body):
    """An image and the labels to choose from."""

    image: Picture
    labels: Annotated[list[Text], Field(min_length=1, max_length=TEXTS)]
    templates: Annotated[list[Text], Field(max_length=8)] = Field(
        default=[], description="sentences with {} where the label goes"
    )


class ClassifyResponse(BaseModel):
    """The labels, the likeliest first."""

    labels: list[Scored]


class ExplainRequest(Body):
    """An image and a text whose place in it is sought."""

    image: Picture
    text: Text
    answer: bool = Field(
        default=False, description="the text is a question: what the answer to it rests on, by the model that answers"
    )


class WordMap(BaseModel):
    """Where a word looks."""

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

    images: Annotated[list[Picture], Field(max_length=IMAGES)] = Field(default=[])
    texts: Annotated[list[Text], Field(max_length=TEXTS)] = Field(default=[])

    @model_validator(mode="after")
    def _something(self) -> Self:
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
    """Whether the server lives."""

    status: str


class Fault(BaseModel):
    """What went wrong."""

    code: str = Field(description="a word for programs")
    message: str = Field(description="what is wrong, and the mend")


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: Fault


def tell_validation(errors: list[Any]) -> str:
    """The first of pydantic's errors in one sentence that names the key, without what was sent."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return f"the body is not JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})"
    said = first["msg"].removeprefix("Value error, ")
    more = f" ({len(errors) - 1} more like it)" if len(errors) > 1 else ""
    return f"{where or 'the body'}: {said[:1].lower()}{said[1:]}{more}"
