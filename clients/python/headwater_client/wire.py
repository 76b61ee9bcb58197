"""Between the protocol's messages and this library's values. With transport.py the only reader of generated code."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from headwater.sampler.v1 import sampler_pb2 as pb

from . import events, replies
from .errors import InvalidRequest
from .options import Options, Parameters, Source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value", bound="DataclassInstance")

# Where each option is in a GenerateRequest.
FIELDS = {
    "model": "model",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width_px",
    "height": "height_px",
    "steps": "step_count",
    "guidance_scale": "guidance_scale",
    "true_cfg_scale": "true_cfg_scale",
    "seed": "seed",
    "count": "count",
    "request_id": "request_id",
    "max_sequence_length": "max_sequence_length",
    "preview_every": "preview.every_step_count",
    "preview_edge": "preview.max_edge_px",
    "format": "output.format",
    "quality": "output.quality",
    "numerics": "numerics",
    "tiled_decode": "tiled_decode",
    "solver": "solver",
    "schedule": "schedule",
    "strength": "strength",
    "rng": "rng",
}
# Options that are files.
FILES = ("images", "mask")
WORDS = {"format": pb.ImageFormat, "numerics": pb.Numerics, "rng": pb.Rng}


def generate_request(prompt: str, options: Options) -> pb.GenerateRequest:
    """Build a request. Raises InvalidRequest naming every value that the protocol cannot carry."""
    request = pb.GenerateRequest()
    violations = []
    for name, value in {"prompt": prompt, **options}.items():
        if name not in FIELDS and name not in FILES:
            raise TypeError(f"{name!r} is no option; there are {', '.join((*FIELDS, *FILES))}")
        try:
            if value is not None and name in FILES:
                _attach(request, name, value)
            elif value is not None:
                _assign(request, FIELDS[name], _number(name, value))
        except OSError as error:
            violations.append((name, f"cannot be read: {error.strerror or error}: {error.filename}"))
        except (TypeError, ValueError):
            violations.append((name, _advice(name, value)))
    if violations:
        raise InvalidRequest.of(*violations)
    return request


def _assign(message: Any, path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    setattr(message, leaf, value)


def _attach(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """Put encoded pictures into a request. Raises OSError, TypeError."""
    if name == "mask":
        request.mask.data = _encoded(value)
        return
    if isinstance(value, bytes | str | os.PathLike):
        raise TypeError("a list is wanted")
    for each in value:
        request.reference_images.add(data=_encoded(each))


def _encoded(source: Source) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _number(name: str, value: object) -> object:
    """The protocol's number for a word; other values as they are. Raises ValueError."""
    enum = WORDS.get(name)
    if enum is None:
        return value
    return enum.Value(f"{_prefix(enum)}{str(value).upper()}")


def _advice(name: str, value: object) -> str:
    enum = WORDS.get(name)
    shown = repr(value)[:60]
    if enum is None:
        return f"{shown} is of the wrong type or too large"
    return f"{shown} is not one of {', '.join(_word(enum, number) for number in enum.values()[1:])}"


def _prefix(enum: Any) -> str:
    """E.g. "IMAGE_FORMAT_"."""
    return str(enum.Name(0)).removesuffix("UNSPECIFIED")


def _word(enum: Any, number: int) -> str:
    """The lower-case word of a number; "unknown" for one that a newer server made up."""
    if number not in enum.values():
        return "unknown"
    return str(enum.Name(number)).removeprefix(_prefix(enum)).lower()


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _optional_seconds(message: Any, name: str) -> float | None:
    return _seconds(getattr(message, name)) if message.HasField(name) else None


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def _read(kind: type[Value], message: Any, **special: object) -> Value:
    """A value whose fields are the message's of the same names; `special` gives those that need a conversion."""
    plain = {f.name: getattr(message, f.name) for f in fields(kind) if f.name not in special}
    return kind(**plain, **special)


def queued(message: pb.Queued) -> events.Queued:
    """Convert."""
    return _read(events.Queued, message, estimate_s=_optional_seconds(message, "estimate"))


def started(message: pb.Started) -> events.Started:
    """Convert."""
    return _read(events.Started, message)


def progress(message: pb.Progress) -> events.Progress:
    """Convert."""
    phase = events.Phase(_word(pb.Phase, message.phase))
    return _read(events.Progress, message, phase=phase, sigma=_optional(message, "sigma"))


def preview(message: pb.Preview) -> events.Preview:
    """Convert."""
    return _read(events.Preview, message)


def image(index: int, data: bytes, summary: pb.ImageSummary, transfer_s: float) -> events.Image:
    """Convert; `data` is the whole file, checked."""
    return _read(
        events.Image,
        summary,
        image_index=index,
        data=data,
        sha256=summary.sha256.hex(),
        format=events.ImageFormat(_word(pb.ImageFormat, summary.format)),
        transfer_s=transfer_s,
    )


def finished(message: pb.Finished) -> events.Finished:
    """Convert."""
    return _read(
        events.Finished,
        message,
        seeds=tuple(message.seeds),
        queue_time_s=_seconds(message.queue_time),
        run_time_s=_seconds(message.run_time),
        stall_time_s=_seconds(message.stall_time),
        numerics=events.Numerics(_word(pb.Numerics, message.numerics)),
        parameters=_parameters(message.parameters),
        phase_times_s={events.Phase(_word(pb.Phase, each.phase)): _seconds(each.time) for each in message.phase_times},
    )


def _parameters(request: pb.GenerateRequest) -> Parameters:
    """The options that are set in a request, by this library's names."""
    found: dict[str, object] = {"prompt": request.prompt}
    for name, path in FIELDS.items():
        value = _lookup(request, path)
        if value is not None:
            found[name] = _word(WORDS[name], cast(int, value)) if name in WORDS else value
    return cast(Parameters, found)


def _lookup(message: Any, path: str) -> object | None:
    """The value at `path`, or None where it is not set."""
    *parents, leaf = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    return next((value for field, value in message.ListFields() if field.name == leaf), None)


def model(message: pb.ModelSummary) -> replies.Model:
    """Convert."""
    state = replies.ModelState(_word(pb.ModelState, message.state))
    return _read(replies.Model, message, state=state, tasks=_tasks(message))


def _tasks(message: pb.ModelSummary | pb.GetModelResponse) -> tuple[replies.Task, ...]:
    return tuple(replies.Task(_word(pb.Task, each)) for each in message.tasks)


def model_details(message: pb.GetModelResponse) -> replies.ModelDetails:
    """Convert."""
    return _read(
        replies.ModelDetails,
        message,
        summary=model(message.summary),
        numerics=events.Numerics(_word(pb.Numerics, message.numerics)),
        default_guidance_scale=_optional(message, "default_guidance_scale"),
        request_fields=tuple(message.request_fields),
        solvers=tuple(message.solvers),
        schedules=tuple(message.schedules),
        tasks=_tasks(message),
        default_strength=_optional(message, "default_strength"),
        default_inpaint_strength=_optional(message, "default_inpaint_strength"),
        components=tuple(_read(replies.Component, c, outside=tuple(c.outside)) for c in message.components),
    )


def preparation(message: pb.PrepareModelResponse) -> replies.Preparation:
    """Convert."""
    return _read(replies.Preparation, message, eta_s=_optional_seconds(message, "eta"))


def status(message: pb.GetStatusResponse) -> replies.Status:
    """Convert."""
    names = tuple(message.attached_models)
    return _read(replies.Status, message, uptime_s=_seconds(message.uptime), attached_models=names)
