"""Errors of a request: HTTP status, one sentence, and the JSON body `{"error": {"message", "type", "code"}}`.

400 the request cannot be read; 401 missing or wrong API key; 403 from a page of another site; 408 the body stalled;
413 larger than the server accepts; 415 not JSON by its headers; 421 for another Host; 422 nothing in it can be scored;
429 the queue is full (503 on routes whose clients do not retry after a 4xx); 500 the model failed on it; 503 the server
is shutting down; 504 not scored in time.
"""

from __future__ import annotations

import json

from starlette.responses import Response

from armorm.errors import ArmormError

TYPES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timed_out",
    413: "too_large",
    415: "unsupported_media_type",
    421: "misdirected",
    422: "unscorable",
    429: "overloaded",
    500: "model_failed",
    503: "unavailable",
    504: "timed_out",
}
_LONGEST_MESSAGE = 1000


class RequestError(ArmormError):
    """An error that is sent as the response to a request.

    `retry_after` is the number of seconds after which to try again, or None if that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(message)

    def response(self, overload_status: int = 429) -> Response:
        """The HTTP response; `overload_status` replaces 429 on this route."""
        status = overload_status if self.status == 429 else self.status
        message = str(self)
        message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
        error = {"message": message, "type": TYPES.get(status, "error"), "code": status}
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else None
        return Response(json.dumps({"error": error}), status, headers, "application/json")
