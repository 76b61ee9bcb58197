"""One table between our exceptions and gRPC statuses, and the interceptor that applies it.

A status carries the exception's own sentence only for types of services/errors.py; anything else becomes INTERNAL with
a fixed text, and its trace goes to the log. The way back, `error_from`, is for callers of another Headwater service.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services import errors

DOMAIN = "headwater"
INTERNAL_TEXT = "internal error; the server's log says more"
SHUTDOWN_RETRY_S = 1.0

_Code = grpc.StatusCode
TABLE: dict[type[errors.HeadwaterError], tuple[grpc.StatusCode, str]] = {
    errors.InvalidRequest: (_Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.UnknownModel: (_Code.NOT_FOUND, "UNKNOWN_MODEL"),
    errors.DuplicateRequest: (_Code.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    errors.NotServed: (_Code.UNIMPLEMENTED, "NOT_SERVED"),
    errors.NotAllowed: (_Code.PERMISSION_DENIED, "NOT_ALLOWED"),
    errors.QueueFull: (_Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.ShuttingDown: (_Code.UNAVAILABLE, "SHUTTING_DOWN"),
    errors.LoaderGone: (_Code.UNAVAILABLE, "LOADER_GONE"),
    errors.DeviceGone: (_Code.UNAVAILABLE, "DEVICE_GONE"),
    errors.BadCheckpoint: (_Code.FAILED_PRECONDITION, "BAD_CHECKPOINT"),
    errors.CheckpointChanged: (_Code.DATA_LOSS, "CHECKPOINT_CHANGED"),
    errors.UnsupportedModel: (_Code.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
    errors.BadConfig: (_Code.FAILED_PRECONDITION, "BAD_CONFIG"),
    errors.BadArena: (_Code.FAILED_PRECONDITION, "BAD_ARENA"),
    errors.HostMemoryFull: (_Code.RESOURCE_EXHAUSTED, "HOST_MEMORY_FULL"),
    errors.DeviceMemoryFull: (_Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY_FULL"),
    errors.Leased: (_Code.FAILED_PRECONDITION, "LEASED"),
    errors.Cancelled: (_Code.CANCELLED, "CANCELLED"),
}
_BY_REASON = {reason: kind for kind, (_, reason) in TABLE.items()}
_BY_CODE = {_Code.UNAVAILABLE: errors.LoaderGone, _Code.CANCELLED: errors.Cancelled}

_log = structlog.get_logger()


def status_from(error: Exception) -> status_pb2.Status:
    """The status a caller gets for `error`: code, one sentence, ErrorInfo and at most one more detail."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            code, reason = TABLE[kind]
            status = status_pb2.Status(code=code.value[0], message=str(error))
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
            _add_detail(status, error)
            return status
    status = status_pb2.Status(code=_Code.INTERNAL.value[0], message=INTERNAL_TEXT)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN))
    return status


def error_from(rpc_error: grpc.aio.AioRpcError) -> errors.HeadwaterError:
    """The exception behind a status of another Headwater service; the root type for a status that is not ours."""
    message = rpc_error.details() or ""
    status = status_pb2.Status()
    metadata: Any = rpc_error.trailing_metadata() or ()
    for key, value in metadata:
        if key == rpc_status.GRPC_DETAILS_METADATA_KEY:
            status.MergeFromString(value)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(bad) or detail.Unpack(retry)
    kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else _BY_CODE.get(rpc_error.code())
    if kind is errors.InvalidRequest:
        return errors.InvalidRequest(*((item.field, item.description) for item in bad.field_violations))
    if kind is errors.QueueFull:
        return errors.QueueFull(message, retry.retry_delay.ToTimedelta().total_seconds())
    return kind(message) if kind else errors.HeadwaterError(f"{rpc_error.code().name}: {message}")


def _add_detail(status: status_pb2.Status, error: Exception) -> None:
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation
        items = [violation(field=field, description=text) for field, text in error.violations]
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=items))
    elif isinstance(error, errors.QueueFull | errors.ShuttingDown | errors.DeviceGone):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(1e9 * getattr(error, "retry_after_s", SHUTDOWN_RETRY_S)))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))


class _Undecodable:
    """Stands for a request whose bytes are no message of its type."""


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Maps what handlers raise and logs one line for each call; never a field of a request.

    admit: called with who calls (`context.peer()`) before anything else; raises for who may not.
    """

    def __init__(self, admit: Callable[[str], None] = lambda peer: None) -> None:
        self._admit = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:  # unknown method; reflection
            return handler
        method = str(handler_call_details.method)
        codec = _decoder(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method), *codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), *codec)

    def _unary(self, behavior: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: Any) -> Any:
            async with _answering(method, context):
                self._admit(context.peer())
                _check_decoded(request)
                return await behavior(request, context)

        return answer

    def _stream(self, behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
        if not inspect.isasyncgenfunction(behavior):  # writes by itself, as health's Watch does
            return self._unary(behavior, method)

        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            async with _answering(method, context), aclosing(behavior(request, context)) as responses:
                self._admit(context.peer())
                _check_decoded(request)
                async for response in responses:
                    yield response

        return answer


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except Exception:  # whatever protobuf raises; gRPC would send its text to the caller
            return _Undecodable()

    return decoded


def _check_decoded(request: object) -> None:
    if isinstance(request, _Undecodable):
        raise errors.InvalidRequest(("request", "these bytes are no message of the method's request type"))


@asynccontextmanager
async def _answering(method: str, context: Any) -> AsyncIterator[None]:
    structlog.contextvars.clear_contextvars()
    start = time.monotonic()
    code = "OK"
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    except grpc.aio.AbortError:
        code = "ABORTED_BY_HANDLER"
        raise
    except Exception as error:
        status = rpc_status.to_status(status_from(error))
        code = status.code.name
        if not isinstance(error, errors.HeadwaterError):
            _log.error("unexpected exception", method=method, exc_info=error)
        await context.abort_with_status(status)
    finally:
        emit = _log.debug if method.startswith("/grpc.") else _log.info
        emit("rpc", method=method, status=code, duration_ms=round(1e3 * (time.monotonic() - start), 1))
