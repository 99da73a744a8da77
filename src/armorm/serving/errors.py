"""Refusals of a request: an HTTP status and one sentence.

In:  what is wrong. Out: an exception that the app turns into `{"error": {"message", "type", "code"}}`.

400 the request cannot be read; 401 no key or a wrong one; 413 it is larger than this server takes; 422 it was
read, and nothing in it can be scored; 429 (503 on routes whose clients give up on every 4xx) the queue is full;
500 the model failed on it; 503 the server is going down; 504 it was not scored in time.
"""

from __future__ import annotations

from armorm.errors import ArmormError

TYPES = {
    400: "invalid_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    422: "unscorable",
    429: "overloaded",
    500: "model_failed",
    503: "unavailable",
    504: "timed_out",
}


class RequestError(ArmormError):
    """A request that gets an error for an answer.

    Attributes:
        status: HTTP status.
        retry_after: seconds after which to try again, or None where that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(message)

    @property
    def kind(self) -> str:
        """Name of the status, for programs."""
        return TYPES.get(self.status, "error")
