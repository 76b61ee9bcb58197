"""The command `headwater bench`; see cli.py for exit codes."""

import asyncio
from pathlib import Path
from typing import Any

import click

from . import flags, gauge, tables
from .client import AsyncClient
from .outputs import Folder
from .run import Keep, Run, Tell
from .workload import Workload, read_prompts

ONE_OR_MORE = click.IntRange(min=1)


@click.command()
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--clients", type=ONE_OR_MORE, default=1, show_default=True, help="Requests in flight at once.")
@click.option("--requests", type=ONE_OR_MORE, help="How many; default: one for each prompt.")
@click.option("--warm-up", type=click.IntRange(min=0), default=1, show_default=True, help="Requests before, uncounted.")
@flags.picture
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture; the next count up.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the pictures there.")
@click.option("--retries", type=int, help="Further attempts of a request, in its time.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for each request.")
@flags.as_json
@click.option("--quiet", is_flag=True, help="No bar.")
@flags.address
def bench(prompts: Path, output: Path | None, **given: Any) -> int:
    """Measure how fast a server draws the prompts of a file, one a line (# begins a comment).

    Clients take requests from one queue, each the next one when its last one has ended. Prompts are taken in turn and
    seeds count up, so a run can be repeated. Exit code 1 if a request failed, which stops no other. Ctrl-C stops all of
    them and prints what was measured so far.
    """
    keep = _keep(output)
    run = Run(_workload(read_prompts(prompts), given))
    client = AsyncClient(given["address"], retries=given["retries"])
    try:
        with gauge.gauging(run, given["quiet"] or given["as_json"]) as tell:
            asyncio.run(_drive(run, client, keep, tell))
    finally:
        if given["as_json"]:
            tables.show_json(tables.measured(run))
        else:
            tables.show_run(run)
    return 1 if run.failed else 0


def _keep(output: Path | None) -> Keep | None:
    if output is None:
        return None
    folder = Folder(output)
    folder.check()
    return folder.keep


def _workload(prompts: tuple[str, ...], given: dict[str, Any]) -> Workload:
    workload = Workload(
        prompts,
        request_count=given["requests"] or len(prompts),
        client_count=given["clients"],
        warm_up_count=given["warm_up"],
        seed=given["seed"],
        timeout=given["timeout"],
        options=flags.options(given),
    )
    workload.check()
    return workload


async def _drive(run: Run, client: AsyncClient, keep: Keep | None, tell: Tell) -> None:
    async with client:
        await run.drive(client, keep, tell)
