"""What a server allows: where it listens, who may ask, and how much of everything one request may have."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import TercetError

KEY_VARIABLE = "TERCET_KEY"
KEY_LENGTH = 16
TEXT_LENGTH = 1000  # characters of one text; the model reads its first few dozen words
TEXTS = 64  # texts, labels or answers of one request
IMAGES = 16  # images of one request
RESULTS = 200  # of one search
RERANK = 200  # candidates of one search that the fusion encoder ranks anew
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServeSettings:
    """The bounds of a server.

    Attributes:
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        key: what a client sends as `Authorization: Bearer KEY`; None asks for nothing.
        origins: web origins whose pages may call the interface; none by default.
        hosts: names that the server answers to; default the names of this machine itself while it listens to them
            alone, and any name otherwise.
        show_uris: tell clients where images lie; their names alone otherwise.
        queue: requests that wait or are worked at; one more is refused with 429.
        batch: images and texts that go through the model together.
        window: seconds that the first request of a batch waits for others.
        body_bytes: of one request.
        pixel_limit: of one image.
        body_seconds: until a request has arrived whole.
        request_seconds: until it is answered.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    show_uris: bool = False
    queue: int = 64
    batch: int = 64
    window: float = 0.003
    body_bytes: int = 12 * 2**20
    pixel_limit: int = 50_000_000
    body_seconds: float = 10.0
    request_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {"queue": 1, "batch": 1, "window": 0, "body_bytes": 1024, "pixel_limit": 1, "port": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise TercetError(f"{name} is {getattr(self, name)}; it must be {bound} or more")
        for name in ("body_seconds", "request_seconds"):
            if getattr(self, name) <= 0:
                raise TercetError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.port > 65535:
            raise TercetError(f"port is {self.port}; ports end at 65535")
        if "*" in self.origins and self.key is None:
            raise TercetError("origins * lets every web page read the index; name the origins, or set a key")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> frozenset[str] | None:
        """Names that a request may be addressed to; None: any."""
        if not self.local:
            return frozenset(self.hosts) or None
        # A web page can point a name of its own at this machine, and would then count as the same origin.
        return frozenset({*LOOPBACK_NAMES, *self.hosts})


def read_key(file: str | None) -> str | None:
    """The key of a file, or else of the environment variable `TERCET_KEY`; None where there is neither.

    Raises:
        TercetError: the file cannot be read, or the key is too short or cannot stand in a header.
    """
    if file is None:
        origin, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        origin = file
        try:
            key = Path(file).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TercetError(f"{file}: the key cannot be read ({error}); write it there as one line") from error
    key = key.strip()
    if len(key) < KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise TercetError(
            f"{origin}: a key has {KEY_LENGTH} or more letters, digits and signs without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return key
