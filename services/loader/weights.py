"""Which files hold a component's params: those that the operator names for it, else what its folder has."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from services.errors import BadCheckpoint
from services.params.checkpoint import joined, read_checkpoint
from services.params.recognise import Architecture, Role, recognise
from services.params.specs import Checkpoint

WEIGHTS_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data"}
)
# Files that tell a tokenizer, processor or scheduler, which have no params, from a model.
_NO_MODEL = frozenset(
    {"tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "scheduler_config.json"}
)
_STEMS = ("diffusion_pytorch_model", "model")
# By what pipelines call their components; a number may follow (text_encoder_2).
_ROLES = {
    "transformer": Role.DENOISER,
    "unet": Role.DENOISER,
    "text_encoder": Role.TEXT_ENCODER,
    "vae": Role.VAE,
}


def pick_files(
    root: Path, parts: Sequence[str], variant: str, named: Mapping[str, tuple[Path, ...]]
) -> dict[str, tuple[Path, ...]]:
    """Indexes and files of all components with params, by component; `named` replaces what folders have.

    Raises BadCheckpoint, OSError.
    """
    if odd := sorted(named.keys() - set(parts)):
        raise BadCheckpoint(
            f"files are named for {odd[0][:64]!r}, which model_index.json does not have (it has {', '.join(parts)});"
            " a component of several files has a list of them"
        )
    picked = {}
    for part in parts:
        if part in named:
            _check_folder(root / part)
            picked[part] = named[part]
        elif path := pick_weights(root / part, variant):
            picked[part] = (path,)
    return picked


def pick_weights(folder: Path, variant: str) -> Path | None:
    """The index or file that holds a component's params; None if the component has none.

    In this order: with the variant, then without; shards before a single file; diffusers' name before transformers';
    else the only safetensors file there is; else the only GGUF file.
    """
    _check_folder(folder)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for word in dict.fromkeys((variant, "")):
        for stem in _STEMS:
            for name in _candidates(stem, word):
                if name in names:
                    return folder / name
    for suffix, kind in ((".safetensors", "safetensors"), (".gguf", "GGUF")):
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) > 1:
            raise BadCheckpoint(
                f"{folder.name}: several {kind} files and none with a usual name: {found[0]}, ...;"
                " models.toml can say which, under [models.NAME.files]"
            )
        if found:
            return folder / found[0]
    _check_has_none(folder.name, names)
    return None


def read_named(component: str, paths: Sequence[Path]) -> Checkpoint:
    """The checkpoint of files that the operator names for a component.

    Raises BadCheckpoint, also if they can be told to be for something else.
    """
    try:
        read = [read_checkpoint(path) for path in paths]
        for number, (path, checkpoint) in enumerate(zip(paths, read, strict=True)):
            _check_role(component, path.name, recognised(checkpoint), is_first=not number)
        return joined(read)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{component}: {error}") from error


def recognised(checkpoint: Checkpoint) -> Architecture:
    return recognise((tensor.name for tensor in checkpoint.tensors), checkpoint.files[0].stated)


def role_of(component: str) -> Role | None:
    """What a component is to its pipeline, as far as its name tells."""
    return _ROLES.get(component.rstrip("0123456789").rstrip("_"))


def _check_role(component: str, file: str, found: Architecture, is_first: bool) -> None:
    """A LoRA or an all-in-one file is no component at all; else it is told by the component's name."""
    wanted = role_of(component)
    is_other = wanted is not None and found.role not in (wanted, Role.UNKNOWN)
    if found.role is Role.VISION_TOWER and wanted is Role.TEXT_ENCODER and not is_first:
        return
    if is_other or found.role in (Role.LORA, Role.ALL_IN_ONE):
        raise BadCheckpoint(f"{file}: {wanted or 'one component'} expected, {found} found: name another file")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder.name}: named by model_index.json, but the folder is missing")


def _check_has_none(folder: str, names: set[str]) -> None:
    """Raises BadCheckpoint if a folder without files that are read here should have some."""
    if any(Path(name).suffix in WEIGHTS_SUFFIXES for name in names):
        raise BadCheckpoint(f"{folder}: weights, but no safetensors: convert them (pickles are never opened)")
    if "config.json" in names and not names & _NO_MODEL:
        raise BadCheckpoint(f"{folder}: a model's config.json, but no safetensors file and no GGUF file")


def _candidates(stem: str, variant: str) -> tuple[str, ...]:
    if not variant:
        return f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    return (
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
        f"{stem}.{variant}.safetensors",
    )
