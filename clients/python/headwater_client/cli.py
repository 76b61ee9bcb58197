"""The command `headwater`. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 anything wrong, said in one line; 130 Ctrl-C, which also cancels the work on the server.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from . import display, tables
from .blocking import Client
from .errors import HeadwaterError, InvalidRequest
from .events import Event, Finished, Image, Preview
from .outputs import Outputs, parse_size

address = click.option(
    "--address",
    envvar="HEADWATER_ADDRESS",
    default="127.0.0.1:50051",
    show_default=True,
    show_envvar=True,
    help="unix:/path or host:port; several with commas.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, no bars.")
timeout = click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for everything.")


def _version() -> str:
    try:
        return metadata.version("headwater-client")
    except metadata.PackageNotFoundError:
        return "from source"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="headwater")
def cli() -> None:
    """Draw pictures with a Headwater sampler."""


@cli.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="File for the picture: .png, .jpg, .jpeg or .webp. With --count above 1: out-0.png, out-1.png, ...",
)
@click.option("--model", help="Name of the model; default: the only one.")
@click.option("--size", help="WIDTHxHEIGHT in pixels; default: the model's.")
@click.option("--steps", type=int, help="Denoise steps; default: the model's.")
@click.option("--seed", type=int, help="Seed of the first picture; the next ones count up.")
@click.option("--count", type=int, default=1, show_default=True, help="Pictures.")
@click.option("--guidance", type=float, help="guidance_scale; default: the model's.")
@click.option("--cfg", type=float, help="true_cfg_scale, where the model has one.")
@click.option("--negative", help="What to steer away from.")
@click.option("--quality", type=int, help="Of .jpg and .webp, 1 to 100.")
@click.option("--save-preview", type=click.Path(path_type=Path), metavar="DIR", help="Keep previews there.")
@click.option("--preview-every", type=int, metavar="N", help="Steps between previews; 1 with --save-preview.")
@click.option("--retries", type=int, help="Further attempts while the server is gone or its queue is full.")
@timeout
@as_json
@click.option("--quiet", is_flag=True, help="No bars and no file names; errors only.")
@address
def generate(prompt: str, output: Path, size: str | None, save_preview: Path | None, **flags: Any) -> None:
    """Draw PROMPT and print the names of the files; existing files are replaced.

    A file appears when its picture is complete, and is never half written. If a later picture fails, the earlier
    files stay.
    """
    outputs = Outputs(output, flags["count"], save_preview)
    outputs.check()
    options = _options(outputs, size, flags)
    files: list[str] = []
    images: list[Image] = []
    quiet = flags["quiet"] or flags["as_json"]
    client = Client(flags["address"], retries=flags["retries"])
    with client, display.drawing(quiet) as show:

        def take(event: Event) -> None:
            if isinstance(event, Image):
                files.append(str(outputs.write(event)))
                images.append(event)
            elif isinstance(event, Preview):
                outputs.write_preview(event)
            show(event)

        result = client.generate(prompt, timeout=flags["timeout"], on_event=take, **options)
    _report(files, images, result.finished, flags)


def _options(outputs: Outputs, size: str | None, flags: dict[str, Any]) -> Any:
    if flags["preview_every"] and outputs.preview_dir is None:
        raise InvalidRequest.of(("--preview-every", "say with --save-preview DIR where previews go"))
    width, height = parse_size(size)
    return {
        **{name: flags[name] for name in ("model", "steps", "seed", "count", "quality")},
        "width": width,
        "height": height,
        "guidance_scale": flags["guidance"],
        "true_cfg_scale": flags["cfg"],
        "negative_prompt": flags["negative"],
        "preview_every": flags["preview_every"] or (1 if outputs.preview_dir is not None else None),
        "format": outputs.format,
    }


def _report(files: list[str], images: list[Image], finished: Finished, flags: dict[str, Any]) -> None:
    if flags["as_json"]:
        tables.show_json(tables.generated(files, images, finished))
    elif not flags["quiet"]:
        for file in files:
            click.echo(file)


@cli.command()
@as_json
@address
def models(address: str, as_json: bool) -> None:
    """List the models that the server can draw with."""
    with Client(address) as client:
        found = client.models()
    if as_json:
        tables.show_json([asdict(each) for each in found])
    else:
        tables.show_models(found)


@cli.command()
@click.argument("model", default="")
@timeout
@as_json
@click.option("--quiet", is_flag=True, help="Errors only.")
@address
def prepare(model: str, address: str, timeout: float | None, as_json: bool, quiet: bool) -> None:
    """Bring MODEL (default: the only one) into the server's memory, so that the first picture waits for nothing.

    Ctrl-C ends the command, not the reading.
    """
    last = None
    with Client(address) as client, display.preparing(quiet or as_json) as show:
        for last in client.prepare(model, timeout=timeout):
            show(last)
    if as_json and last is not None:
        tables.show_json(asdict(last))


@cli.command()
@as_json
@address
def status(address: str, as_json: bool) -> None:
    """Show what the server is doing."""
    with Client(address) as client:
        found = client.status()
    if as_json:
        tables.show_json(asdict(found))
    else:
        tables.show_status(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    # gRPC's own log lines would come between ours; whoever wants them sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = cli.main(args=arguments, prog_name="headwater", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message(), err=True)
        sys.exit(1)
    except click.ClickException as error:
        _fail(error.format_message())
    except HeadwaterError as error:
        _fail("; ".join(f"{field}: {advice}" for field, advice in error.violations) or error.message)
    except OSError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("headwater: cancelled", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"headwater: error: {display.clean(message)}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
