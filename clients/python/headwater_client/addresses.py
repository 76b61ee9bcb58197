"""Where servers are."""

import os
import re
from collections.abc import Sequence

from .errors import InvalidRequest

VARIABLE = "HEADWATER_ADDRESS"
DEFAULT = "127.0.0.1:50051"
HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")


def parse(address: str | Sequence[str] | None) -> tuple[str, ...]:
    """The addresses in `address`, which may hold several, with commas or as a sequence.

    None means those in the environment's HEADWATER_ADDRESS, else 127.0.0.1:50051. Raises InvalidRequest.
    """
    given = address if address is not None else os.environ.get(VARIABLE) or DEFAULT
    parts = given.split(",") if isinstance(given, str) else list(given)
    found = tuple(part.strip() for part in parts if part.strip())
    if not found:
        raise _wrong(str(address))
    for each in found:
        _check(each)
    return found


def _check(address: str) -> None:
    if address.startswith("unix:"):
        good = len(address) > len("unix:")
    else:
        match = HOST_PORT.fullmatch(address)
        good = match is not None and 0 < int(match[2]) < 65536
    if not good:
        raise _wrong(address)


def _wrong(address: str) -> InvalidRequest:
    text = f"{address!r} is no address; write unix:/path/of/socket or host:port"
    return InvalidRequest.of(("address", text), reason="BAD_ADDRESS")
