"""On which NUMA nodes of the host an arena's pages are."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from services.params.mapping import Policy, address_of, set_policy

ONLINE = Path("/sys/devices/system/node/online")  # a kernel without NUMA has none
_MOST = 1 << 10  # nodes that any kernel can have


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes to take pages from: in turn if interleaved, else from them while they have free pages, then from others.

    They are preferred and not bound to. A bound file whose nodes are full would have the kernel kill a process, though
    the host has room and the loader admitted the model; a page on another node costs a part of a copy's speed. Without
    nodes: all that are online.
    """

    nodes: tuple[int, ...] = ()
    is_interleaved: bool = False

    def apply(self, fd: int, size_bytes: int) -> None:
        """Have pages of a tmpfs's file come from here, whichever process and call makes them; those there are stay.

        Raises OSError if the kernel takes no such policy.
        """
        policy = Policy.INTERLEAVE if self.is_interleaved else Policy.of_preferred(len(self.nodes))
        nodes = self.nodes or online_nodes()
        # The policy becomes the file's, and outlives the mapping; no page is touched.
        with mmap.mmap(fd, size_bytes) as mapped, memoryview(mapped) as memory:
            set_policy(address_of(memory), size_bytes, policy, nodes)


def parse_placement(text: str) -> Placement | None:
    """`off` (None), `interleave`, or nodes such as `0` and `0,2-3`. Raises ValueError."""
    if text == "off":
        return None
    if text == "interleave":
        return Placement(is_interleaved=True)
    return Placement(parse_list(text))


def online_nodes() -> tuple[int, ...]:
    """Raises OSError where the kernel knows no nodes."""
    return parse_list(ONLINE.read_text())


def parse_list(text: str) -> tuple[int, ...]:
    """Numbers as the kernel writes them: `0`, `0-1,4`. Raises ValueError."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        end = int(last) if dash else int(first)
        if not 0 <= int(first) <= end < _MOST:
            raise ValueError(f"{part!r} is no number, or range of numbers, below {_MOST}")
        numbers |= set(range(int(first), end + 1))
    return tuple(sorted(numbers))
