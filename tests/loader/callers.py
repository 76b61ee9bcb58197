"""A process in which many callers prepare one model at the same moment: ADDRESS, MODEL, how many callers.

Says "ready" once it is connected, begins when it is told a line, and ends with what each caller heard, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys

from services.rpc.loader_client import LoaderClient


async def prepare(client: LoaderClient, model: str) -> tuple[int, bool]:
    """(extents heard of, whether the fill was said to be done)."""
    extents, done = 0, False
    async for news in client.prepare(model):
        extents += sum(len(part.extents) for part in news.ready)
        done = news.done
    return extents, done


async def crowd(address: str, model: str, count: int) -> list[tuple[int, bool]]:
    async with LoaderClient(address) as client:
        await client.list_models()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await asyncio.gather(*(prepare(client, model) for _ in range(count)))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(crowd(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
