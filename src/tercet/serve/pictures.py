"""Images that requests bring or name, decoded within bounds; and images of the index as a browser can show them."""

from __future__ import annotations

import base64
import binascii
import io
import logging
from typing import TYPE_CHECKING

from PIL import Image

from tercet.data.augment import Pixels
from tercet.data.images import decode, resize
from tercet.errors import TercetError
from tercet.serve.refusals import Refusal

if TYPE_CHECKING:
    from tercet.search.index import Index
    from tercet.serve.schema import Picture

log = logging.getLogger("tercet.serve")

# How files begin that every browser shows; anything else is shown as a JPEG made of it.
_SHOWN = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}
_WEBP = (b"RIFF", b"WEBP")


def read_picture(picture: Picture, index: Index, size: int, pixel_limit: int) -> Pixels:
    """The image of a request as the model sees it, uint8 `[size, size, 3]`.

    Raises:
        Refusal: no image of that id.
        TercetError: no base64, no image, or one beyond the limit.
    """
    if picture.id is not None:
        return resize(decode(original(index, picture.id), "the image of the index"), size)
    assert picture.base64 is not None
    _, comma, rest = picture.base64.partition(",")
    encoded = rest if comma and picture.base64.startswith("data:") else picture.base64
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TercetError("image.base64 is no base64; send a file's bytes, encoded without line breaks") from error
    return resize(decode(data, "image.base64", pixel_limit), size)


def original(index: Index, identifier: str) -> bytes:
    """The file of an image of the index.

    Raises:
        Refusal: no image of that id, or its file cannot be read any more.
    """
    require(index, identifier)
    try:
        return index.image(identifier)
    except TercetError as error:
        # The message names a path, which is the server's own business.
        log.warning("image %s cannot be served: %s", identifier, error)
        raise Refusal(
            404, "the file of this image cannot be read any more; run `tercet index` again to drop it"
        ) from error


def require(index: Index, identifier: str) -> None:
    """Refuse an id that the index does not hold.

    Raises:
        Refusal: no image of that id.
        TercetError: the index cannot be read.
    """
    if not index.rows([identifier], ["id"]):
        raise Refusal(404, "the index holds no image of that id; ids come with the results of a search")


def shown(data: bytes) -> tuple[bytes, str]:
    """A file that browsers show, and its media type; a TIFF and its like become a JPEG.

    Raises:
        TercetError: no image.
    """
    for start, kind in _SHOWN.items():
        if data.startswith(start):
            return data, kind
    if data.startswith(_WEBP[0]) and data[8:12] == _WEBP[1]:
        return data, "image/webp"
    stream = io.BytesIO()
    Image.fromarray(decode(data, "the image of the index")).save(stream, "JPEG", quality=92)
    return stream.getvalue(), "image/jpeg"
