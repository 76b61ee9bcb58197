"""Draws pictures with a Headwater sampler, blocking (Client) or with asyncio (AsyncClient)."""

from .blocking import Client
from .client import AsyncClient
from .errors import (
    BadModel,
    BrokenReply,
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    HeadwaterError,
    InvalidRequest,
    MemoryFull,
    NotServed,
    QueueFull,
    Unavailable,
    UnknownModel,
    Unreachable,
)
from .events import Event, Finished, Image, ImageFormat, Numerics, Phase, Preview, Progress, Queued, Result, Started
from .options import Options, Parameters
from .replies import Component, Model, ModelDetails, ModelState, Preparation, Status, Task

__all__ = [
    "Client",
    "AsyncClient",
    "Options",
    "Parameters",
    "Result",
    "Event",
    "Queued",
    "Started",
    "Progress",
    "Preview",
    "Image",
    "Finished",
    "Phase",
    "Numerics",
    "ImageFormat",
    "Model",
    "ModelDetails",
    "ModelState",
    "Component",
    "Preparation",
    "Status",
    "Task",
    "HeadwaterError",
    "InvalidRequest",
    "UnknownModel",
    "DuplicateRequest",
    "NotServed",
    "QueueFull",
    "MemoryFull",
    "BadModel",
    "Unavailable",
    "Unreachable",
    "DeadlineExceeded",
    "Cancelled",
    "BrokenReply",
]
