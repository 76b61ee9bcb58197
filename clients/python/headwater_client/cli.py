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

from . import display, flags, tables
from .bench import bench
from .blocking import Client
from .errors import HeadwaterError, InvalidRequest
from .events import Event, Finished, Image, Preview
from .outputs import FORMATS, Outputs


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
    help="File for the picture: .png, .jpg, .jpeg or .webp; default: out.png, or as --format says. "
    "With --count above 1: out-0.png, out-1.png, ...",
)
@click.option("--format", "kind", type=click.Choice(FORMATS), help="Encoding; default: by the suffix of --output.")
@flags.picture
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Picture to start from, or to refer to where the model edits: PNG, JPEG or WebP; up to three.",
)
@click.option("--mask", type=click.Path(path_type=Path), help="Where to repaint the one --image: white is repainted.")
@click.option("--strength", type=float, help="How far to move from --image, 0 to 1; default: the model's.")
@click.option("--seed", type=int, help="Seed of the first picture; the next ones count up.")
@click.option("--quality", type=int, help="Of JPEG and WebP, 1 to 100; default: 90.")
@click.option("--save-preview", type=click.Path(path_type=Path), metavar="DIR", help="Keep previews there.")
@click.option("--preview-every", type=int, metavar="N", help="Steps between previews; 1 with --save-preview.")
@click.option("--retries", type=int, help="Further attempts while the server is gone or its queue is full.")
@flags.timeout
@flags.as_json
@click.option("--quiet", is_flag=True, help="No bars and no file names; errors only.")
@flags.address
def generate(prompt: str, output: Path | None, kind: str | None, save_preview: Path | None, **given: Any) -> None:
    """Draw PROMPT and print the names of the files; existing files are replaced.

    A file appears when its picture is complete, and is never half written. If a later picture fails, the earlier
    files stay.
    """
    outputs = Outputs.asked(output, kind, given["count"], save_preview)
    outputs.check()
    options = _options(outputs, given)
    files: list[str] = []
    images: list[Image] = []
    quiet = given["quiet"] or given["as_json"]
    client = Client(given["address"], retries=given["retries"])
    with client, display.drawing(quiet) as show:

        def take(event: Event) -> None:
            if isinstance(event, Image):
                files.append(str(outputs.write(event)))
                images.append(event)
            elif isinstance(event, Preview):
                outputs.write_preview(event)
            show(event)

        result = client.generate(prompt, timeout=given["timeout"], on_event=take, **options)
    _report(files, images, result.finished, given)


def _options(outputs: Outputs, given: dict[str, Any]) -> Any:
    if given["preview_every"] and outputs.preview_dir is None:
        raise InvalidRequest.of(("--preview-every", "say with --save-preview DIR where previews go"))
    return {
        **flags.options(given),
        "images": given["images"],
        "mask": given["mask"],
        "strength": given["strength"],
        "seed": given["seed"],
        "quality": given["quality"],
        "preview_every": given["preview_every"] or (1 if outputs.preview_dir is not None else None),
        "format": outputs.format,
    }


def _report(files: list[str], images: list[Image], finished: Finished, given: dict[str, Any]) -> None:
    if given["as_json"]:
        tables.show_json(tables.generated(files, images, finished))
    elif not given["quiet"]:
        for file in files:
            click.echo(file)


cli.add_command(bench)


@cli.command()
@flags.as_json
@flags.address
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
@flags.as_json
@flags.address
def model(model: str, address: str, as_json: bool) -> None:
    """Show what MODEL (default: the only one) can do, and its defaults. Attaches it if it is not."""
    with Client(address) as client:
        found = client.model(model)
    if as_json:
        tables.show_json(asdict(found))
    else:
        tables.show_model(found)


@cli.command()
@click.argument("model", default="")
@flags.timeout
@flags.as_json
@click.option("--quiet", is_flag=True, help="Errors only.")
@click.option("--background", is_flag=True, help="Read only while nobody waits for anything else.")
@flags.address
def prepare(model: str, address: str, timeout: float | None, as_json: bool, quiet: bool, background: bool) -> None:
    """Bring MODEL (default: the only one) into the server's memory, so that the first picture waits for nothing.

    Ctrl-C ends the command, not the reading; with --background it ends both.
    """
    last = None
    with Client(address) as client, display.preparing(quiet or as_json) as show:
        for last in client.prepare(model, background=background, timeout=timeout):
            show(last)
    if as_json and last is not None:
        tables.show_json(asdict(last))


@cli.command()
@flags.as_json
@flags.address
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
        _fail(error.text)
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
