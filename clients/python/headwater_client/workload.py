"""What a server is asked when its speed is measured. Knows neither server nor terminal."""

from dataclasses import dataclass, field
from pathlib import Path

from . import wire
from .errors import InvalidRequest
from .options import Options


@dataclass(frozen=True)
class Workload:
    """Requests that differ in prompt and seed only: prompts are taken in turn, no seed comes twice.

    seed: of the first picture. client_count: requests in flight at once. warm_up_count: how many of the first requests
    are sent once more, before the others and not measured. timeout: seconds for each request, or None.
    """

    prompts: tuple[str, ...]
    request_count: int
    client_count: int = 1
    warm_up_count: int = 0
    seed: int = 0
    timeout: float | None = None
    options: Options = field(default_factory=Options)

    def request(self, index: int) -> tuple[str, Options]:
        """Prompt and options of request `index`; the same ones in each run."""
        seed = self.seed + index * (self.options.get("count") or 1)
        return self.prompts[index % len(self.prompts)], {**self.options, "seed": seed}

    def check(self) -> None:
        """Raises InvalidRequest for what the protocol cannot carry, such as a seed that grows too large."""
        for index in (0, self.request_count - 1):
            wire.generate_request(*self.request(index))


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: one a line; blank lines, and lines that begin with #, are none.

    Raises OSError, and InvalidRequest if there is no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InvalidRequest.of(("PROMPTS", f"{path} is no UTF-8 text: byte {error.start}")) from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise InvalidRequest.of(("PROMPTS", f"{path} has no prompt; write one a line"))
    return prompts
