"""From the messages of one Generate to its events: pictures are put together and checked here."""

import hashlib
import time
from collections.abc import Callable

from headwater.sampler.v1 import sampler_pb2 as pb

from . import wire
from .errors import BrokenReply
from .events import Event, Finished, Image, Result, Started


class Assembly:
    """Turns messages into events, one call after another; holds the parts of the picture that is coming in.

    `clock` gives seconds and serves Image.transfer_s only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._parts = bytearray()
        self._index: int | None = None
        self._began_s = 0.0
        self._finished = False

    def event(self, message: pb.GenerateResponse) -> Event | None:
        """The event that a message is, or completes; None for a part of a picture and for news of a newer server.

        Raises BrokenReply.
        """
        match message.WhichOneof("event"):
            case "queued":
                return wire.queued(message.queued)
            case "started":
                return wire.started(message.started)
            case "progress":
                return wire.progress(message.progress)
            case "preview":
                return wire.preview(message.preview)
            case "image_chunk":
                return self._chunk(message.image_chunk)
            case "finished":
                return self._finish(message.finished)
        return None

    def end(self) -> None:
        """Call at the end of the stream. Raises BrokenReply if it was not the end of the story."""
        if not self._finished:
            raise BrokenReply("the server ended the stream without Finished")

    def _chunk(self, chunk: pb.ImageChunk) -> Image | None:
        if self._index not in (None, chunk.image_index):
            raise BrokenReply(f"picture {self._index} is not complete, but a part of {chunk.image_index} came")
        if self._index is None:
            self._index, self._began_s = chunk.image_index, self._clock()
        self._parts += chunk.data
        if not chunk.HasField("last"):
            return None
        transfer_s = self._clock() - self._began_s
        data = bytes(self._parts)
        self._parts, self._index = bytearray(), None
        _check(chunk.image_index, data, chunk.last)
        return wire.image(chunk.image_index, data, chunk.last, transfer_s)

    def _finish(self, message: pb.Finished) -> Finished:
        if self._index is not None:
            raise BrokenReply(f"picture {self._index} is not complete, but Finished came")
        self._finished = True
        return wire.finished(message)


def _check(index: int, data: bytes, summary: pb.ImageSummary) -> None:
    if len(data) != summary.size_bytes:
        raise BrokenReply(f"picture {index} has {len(data)} bytes, the server said {summary.size_bytes}")
    digest = hashlib.sha256(data).digest()
    if digest != summary.sha256:
        raise BrokenReply(f"picture {index} has SHA-256 {digest.hex()}, the server said {summary.sha256.hex()}")


def result(events: list[Event]) -> Result:
    """All events of a request as one value. Raises BrokenReply if pictures are missing."""
    images = tuple(sorted((e for e in events if isinstance(e, Image)), key=lambda image: image.image_index))
    finished = next(event for event in events if isinstance(event, Finished))
    if len(images) != len(finished.seeds):
        raise BrokenReply(f"{len(images)} pictures came, the server said {len(finished.seeds)}")
    return Result(images, next((e for e in events if isinstance(e, Started)), None), finished)
