"""Errors in the shape that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal or failure with its HTTP status.

    Args:
        status: HTTP status. message: what was expected, what was got, what to do. param: the field it is about.
        code: short name for programs. headers: more of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def kind(self) -> str:
        named = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return named.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping; send the request to it again later", code="stopping")


def overloaded(waiting: int, seconds: int) -> ApiError:
    return ApiError(
        429,
        f"the server has {waiting} answers in work and takes no more; try again in about {seconds} s",
        code="overloaded",
        headers={"Retry-After": str(seconds)},
    )
