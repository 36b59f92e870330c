"""The Status objects in which an API server says what is wrong, worded as the real one words them."""

import json
from typing import Any, Final

from tests.support import api_http

_REASONS: Final = {
    400: ("BadRequest", "the server rejected our request for an unknown reason"),
    401: ("Unauthorized", "Unauthorized"),
    403: ("Forbidden", "forbidden"),
    404: ("NotFound", "the server could not find the requested resource"),
    405: (
        "MethodNotAllowed",
        "the server does not allow this method on the requested resource",
    ),
    406: (
        "NotAcceptable",
        "only the following media types are accepted: application/json",
    ),
    409: ("Conflict", "the object has been modified"),
    410: ("Expired", "The resourceVersion for the provided list is too old."),
    415: (
        "UnsupportedMediaType",
        "the body of the request was in an unknown format - accepted media types include: "
        "application/json",
    ),
    422: ("Invalid", "invalid"),
    429: ("TooManyRequests", "Too many requests, please try again later."),
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
}


class Refusal(Exception):
    """The answer to this request is an error Status."""

    def __init__(
        self,
        code: int,
        message: str = "",
        *,
        reason: str = "",
        details: dict[str, Any] | None = None,
        continue_token: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        """Take the usual reason and message of *code* where none are given."""
        usual_reason, usual_message = _REASONS.get(code, ("", ""))
        self._code = code
        self._retry_after_s = retry_after_s
        self._details = dict(details or {})
        if retry_after_s is not None:
            self._details["retryAfterSeconds"] = retry_after_s
        self._reason = reason or usual_reason
        self._message = message or usual_message
        self._continue_token = continue_token
        super().__init__(self._message)

    @property
    def response(self) -> api_http.Response:
        headers = (
            (("Retry-After", str(self._retry_after_s)),) if self._retry_after_s is not None else ()
        )
        text = body(
            self._code,
            self._reason,
            self._message,
            details=self._details,
            continue_token=self._continue_token,
        )
        return api_http.Response(self._code, text, headers)


def body(
    code: int,
    reason: str,
    message: str,
    *,
    details: dict[str, Any] | None = None,
    continue_token: str = "",
) -> bytes:
    """Return the JSON of a failure Status."""
    status: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {"continue": continue_token} if continue_token else {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    if details:
        status["details"] = details
    return json.dumps(status).encode()


def invalid_list_options(field: str, problem: str) -> Refusal:
    """Return the 422 for a combination of list and watch parameters that is not allowed."""
    return Refusal(
        422,
        f'ListOptions.meta.k8s.io "" is invalid: {field}: Forbidden: {problem}',
        details={
            "group": "meta.k8s.io",
            "kind": "ListOptions",
            "causes": [
                {
                    "reason": "FieldValueForbidden",
                    "message": f"Forbidden: {problem}",
                    "field": field,
                }
            ],
        },
    )
