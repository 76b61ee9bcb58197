"""What a call can end with, as types. Imports nothing, so that anybody can.

HeadwaterError
|-- InvalidRequest      the request cannot be served as it is; `violations` names every bad field
|-- UnknownModel        no such model
|-- DuplicateRequest    a request with this request_id is in flight
|-- NotServed           part of the protocol, not served by this server
|-- QueueFull           try again after `retry_after_s`
|-- MemoryFull          does not fit the host's memory or the device's
|-- BadModel            the server cannot run the model's files
|-- Unavailable         the server, or its loader, cannot serve now
|   `-- Unreachable     nothing answers at the address
|-- DeadlineExceeded    `timeout` passed; the work was cancelled
|-- Cancelled           the call was cancelled
`-- BrokenReply         the server's bytes are not what it said they are
"""

# ruff: noqa: N818 - the names say what happened, as the server's do
from collections.abc import Mapping


class HeadwaterError(Exception):
    """Root of what this package raises on purpose; itself raised for what has no type of its own.

    code: name of the gRPC status, e.g. "INVALID_ARGUMENT". reason: the server's finer word, e.g. "QUEUE_FULL", or "".
    violations: (field, what to do) for each bad field. retry_after_s: when trying again makes sense, or None.
    details: dynamic values of the message, by name. address: the server asked, or "".
    """

    code = "UNKNOWN"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: float | None = None,
        details: Mapping[str, str] | None = None,
        address: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.details = dict(details or {})
        self.address = address

    @property
    def text(self) -> str:
        """What to tell a person: every bad field if there are any, else the message."""
        return "; ".join(f"{field}: {advice}" for field, advice in self.violations) or self.message


class InvalidRequest(HeadwaterError):
    """The request cannot be served as it is; `violations` holds (field, what to do) for every bad field."""

    code = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, *violations: tuple[str, str], reason: str = "INVALID_REQUEST") -> "InvalidRequest":
        """Build the error that this client raises itself, before anything is sent."""
        text = "; ".join(f"{field}: {advice}" for field, advice in violations)
        return cls(text, violations=violations, reason=reason)


class UnknownModel(HeadwaterError):
    """The server has no model of this name."""


class DuplicateRequest(HeadwaterError):
    """A request with this request_id is in flight on the server."""


class NotServed(HeadwaterError):
    """A feature of the protocol that the server does not serve."""


class QueueFull(HeadwaterError):
    """As many requests wait as the server allows; `retry_after_s` says when to come back."""

    retryable = True


class MemoryFull(HeadwaterError):
    """The model or the picture does not fit the host's memory or the device's; `reason` says which."""


class BadModel(HeadwaterError):
    """The model's files are missing, changed, damaged, or of a kind that the server does not run."""


class Unavailable(HeadwaterError):
    """The server drains, lost its loader, or its connection broke; another one may serve."""

    retryable = True


class Unreachable(Unavailable):
    """Nothing answers at the address."""


class DeadlineExceeded(HeadwaterError):
    """`timeout` passed. The server was told to stop."""


class Cancelled(HeadwaterError):
    """The call was cancelled, here or by the server."""


class BrokenReply(HeadwaterError):
    """Size, digest or order of what came is not what the server said."""

    code = "DATA_LOSS"


BY_REASON: Mapping[str, type[HeadwaterError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "UNKNOWN_MODEL": UnknownModel,
    "DUPLICATE_REQUEST": DuplicateRequest,
    "NOT_SERVED": NotServed,
    "QUEUE_FULL": QueueFull,
    "HOST_MEMORY_FULL": MemoryFull,
    "DEVICE_MEMORY_FULL": MemoryFull,
    "BAD_CHECKPOINT": BadModel,
    "UNSUPPORTED_MODEL": BadModel,
    "CHECKPOINT_CHANGED": BadModel,
    "LOADER_GONE": Unavailable,
    "DEVICE_GONE": Unavailable,
    "SHUTTING_DOWN": Unavailable,
}

# For statuses that no Headwater server wrote: gRPC's own, a proxy's, a newer server's.
BY_CODE: Mapping[str, type[HeadwaterError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNIMPLEMENTED": NotServed,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
}
