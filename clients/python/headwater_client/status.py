"""Turns the status of a failed call into a HeadwaterError. The only reader of google.rpc details."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from . import errors

DOMAIN = "headwater"
DETAILS_KEY = "grpc-status-details-bin"


@dataclass
class Details:
    """What the server said beyond code and message."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_s: float | None = None


def from_rpc(error: grpc.RpcError, address: str, heard: bool) -> errors.HeadwaterError:
    """Translate; heard: whether the server had sent a message before, so that it was there."""
    code = error.code().name
    details = _details(error.trailing_metadata())
    known = errors.BY_REASON.get(details.reason) or errors.BY_CODE.get(code, errors.HeadwaterError)
    kind, message = known, error.details() or f"{code} without a message"
    if code == "UNAVAILABLE" and not details.reason:
        kind, message = _gone(message, address, heard)
    elif code == "DEADLINE_EXCEEDED":
        message = f"the timeout passed before {address} had finished; the work was cancelled"
    return kind(
        message,
        code=code,
        reason=details.reason,
        violations=details.violations,
        retry_after_s=details.retry_after_s,
        details=details.metadata,
        address=address,
    )


def _gone(message: str, address: str, heard: bool) -> tuple[type[errors.HeadwaterError], str]:
    if heard:
        return errors.Unavailable, f"the connection to {address} broke: {message}"
    advice = "start headwater-sampler there, or name another server with --address or HEADWATER_ADDRESS"
    return errors.Unreachable, f"nothing answers at {address}: {advice} ({message})"


def _details(trailers: Iterable[Any] | None) -> Details:
    details = Details()
    for key, value in trailers or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            _read(value, details)
    return details


def _read(value: bytes, details: Details) -> None:
    """Fill `details`; bytes that are no Status say nothing, and the code and message still stand."""
    try:
        for packed in status_pb2.Status.FromString(value).details:
            _read_one(packed, details)
    except DecodeError:
        return


def _read_one(packed: "status_pb2.Any", details: Details) -> None:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    if packed.Unpack(info) and info.domain == DOMAIN:
        details.reason, details.metadata = info.reason, dict(info.metadata)
    elif packed.Unpack(bad):
        details.violations = tuple((each.field, each.description) for each in bad.field_violations)
    elif packed.Unpack(retry):
        details.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
