"""Answers of the calls that draw nothing: models and status. Plain values, sizes in bytes, times in seconds."""

from dataclasses import dataclass

from .events import Numerics, Word


class ModelState(Word):
    """Where a model's params are."""

    ABSENT = "absent"
    FILLING = "filling"
    READY = "ready"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Task(Word):
    """What a picture is made of beside the prompt."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"
    EDIT = "edit"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Model:
    """A model in a list. ready_bytes of size_bytes are in the host's memory; reason is a sentence when FAILED."""

    name: str
    pipeline_class: str
    state: ModelState
    size_bytes: int
    ready_bytes: int
    attached: bool
    reason: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Component:
    """A component of a model as the server bound it; outside_bytes of its params are not in shared memory."""

    name: str
    class_name: str
    size_bytes: int
    outside_bytes: int
    outside: tuple[str, ...]
    gate_count: int
    resident_bytes: int
    dtype: str


@dataclass(frozen=True)
class ModelDetails:
    """One model with what generate() takes for it. request_fields are the protocol's names.

    default_solver and default_schedule are the model's own; "" where they have no common name.
    """

    summary: Model
    numerics: Numerics
    default_width_px: int
    default_height_px: int
    size_multiple_px: int
    default_step_count: int
    default_guidance_scale: float | None
    request_fields: tuple[str, ...]
    solvers: tuple[str, ...]
    default_solver: str
    schedules: tuple[str, ...]
    default_schedule: str
    tasks: tuple[Task, ...]
    max_reference_image_count: int
    default_strength: float | None
    default_inpaint_strength: float | None
    components: tuple[Component, ...]


@dataclass(frozen=True)
class Preparation:
    """How far a model is in the host's memory. rate is 0, eta_s None, while unknown. The last one is done."""

    model: str
    total_bytes: int
    ready_bytes: int
    rate_bytes_per_second: int
    eta_s: float | None
    done: bool


@dataclass(frozen=True)
class Status:
    """What a replica is doing now. vram_budget_bytes is 0 on a CPU; counts and bytes are since its start."""

    replica: str
    version: str
    device: str
    device_name: str
    transfer: str
    vram_budget_bytes: int
    vram_used_bytes: int
    riding_count: int
    queued_count: int
    queue_limit: int
    uptime_s: float
    image_count: int
    streamed_bytes: int
    attached_models: tuple[str, ...]
    loader_connected: bool
