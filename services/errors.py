"""What can go wrong, as types. Everything raised on purpose by this project is one of these.

    HeadwaterError
    |-- InvalidRequest        the caller asked for something that cannot be (fields named)
    |-- UnknownModel          no such model
    |-- DuplicateRequest      a request with this id is in flight
    |-- NotServed             part of the protocol, not served by this server
    |-- NotAllowed            the caller is none of those who may call
    |-- QueueFull             try again later
    |-- ShuttingDown          try again elsewhere
    |-- LoaderGone            the loader does not answer
    |-- DeviceGone            the device computes no more
    |-- BadCheckpoint         files that are missing, truncated, or not what they claim
    |-- CheckpointChanged     a file changed while it was read
    |-- UnsupportedModel      a pipeline that this server does not run
    |-- BadConfig             a models.toml that cannot be used
    |-- BadArena              shared memory that is not the arena it should be
    |-- HostMemoryFull        no room in the arena directory or its budget
    |-- DeviceMemoryFull      does not fit the VRAM budget
    |-- Leased                in use by a sampler
    `-- Cancelled             the caller went away

A message is one sentence or two with the numbers and the remedy, fit for a stranger: no path of this machine's disk.
services/rpc/status.py maps each type to its gRPC status. Imports nothing.
"""


class HeadwaterError(Exception):
    """Root of what this project raises on purpose."""


class InvalidRequest(HeadwaterError):
    """The request cannot be served as it is; `violations` holds (field, what to do) for every bad field."""

    def __init__(self, *violations: tuple[str, str]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))


class UnknownModel(HeadwaterError):
    """No model of this name."""


class DuplicateRequest(HeadwaterError):
    """A request with this request_id is in flight on this replica."""


class NotServed(HeadwaterError):
    """A feature of the protocol that this server does not serve."""


class NotAllowed(HeadwaterError):
    """Who calls is none of the users that may."""


class QueueFull(HeadwaterError):
    """As many requests wait as are allowed; `retry_after_s` says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(HeadwaterError):
    """The replica drains; another one will serve."""


class LoaderGone(HeadwaterError):
    """The loader does not answer."""


class DeviceGone(HeadwaterError):
    """The replica's device computes no more; the replica ends, another one will serve."""


class BadCheckpoint(HeadwaterError):
    """A checkpoint or pipeline folder that is missing, truncated, or not what it claims to be."""


class CheckpointChanged(HeadwaterError):
    """A checkpoint file changed while it was read."""


class UnsupportedModel(HeadwaterError):
    """A pipeline that this server does not run."""


class BadArena(HeadwaterError):
    """An arena file whose header is damaged, of another version, or of another generation."""


class BadConfig(HeadwaterError):
    """A models.toml that cannot be used; what was read of it before goes on."""


class HostMemoryFull(HeadwaterError):
    """The arena directory or the host budget has no room."""


class DeviceMemoryFull(HeadwaterError):
    """The request does not fit the VRAM budget."""


class Leased(HeadwaterError):
    """A sampler maps the model."""


class Cancelled(HeadwaterError):
    """The caller cancelled, or its deadline passed."""
