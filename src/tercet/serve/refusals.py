"""Answers that are no success, all in one shape: `{"error": {"code": ..., "message": ...}}`."""

from __future__ import annotations

import json

CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "not_json",
    421: "unknown_host",
    422: "invalid",
    429: "queue_full",
    500: "failed",
    503: "unavailable",
}


class Refusal(Exception):  # noqa: N818 - what a request is answered with, not a fault of the server
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: what is wrong, and the mend.
        headers: beside the usual ones.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, message)
        self.status, self.message, self.headers = status, message, headers or {}


def error_body(status: int, message: str) -> bytes:
    """The JSON of an error."""
    fault = {"code": CODES.get(status, "failed" if status >= 500 else "bad_request"), "message": message}
    return json.dumps({"error": fault}).encode()
