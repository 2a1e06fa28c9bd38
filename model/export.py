"""A run as a Hugging Face folder: python -m model.export run=DIR out=DIR [step=S]
[format=auto|gpt2|llama|plain]"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.key import STEPS, key
from data import Tokenizer
from data.hf_export import to_files
from model.checkpoint import checkpoint_path, load, open_as_its_folder
from model.gpt import GPT
from model.hf_config import to_config
from model.hf_formats import FORMATS, choose_format
from model.hf_weights import to_tensors

PLAIN = "plain"  # for shapes that no other format expresses: our own names
FILES = {
    "config.json",
    "gpt.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# In the metadata of model.safetensors: of the sequences that the model was trained on.
LENGTH = "training_length"
# In model.safetensors: transformers asks for the one, we know our exports by the other.
MARK = {"format": "pt", "writer": "flatgpt"}


def to_hf(
    model: GPT,
    tokenizer: Tokenizer,
    out: str | Path,
    format: str = "auto",
    length: int | None = None,
) -> str:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load, in fp32, and returns its
    format; of the plain one AutoTokenizer loads the tokenizer, gpt.json holds a GPTConfig and
    model.safetensors the weights of its GPT. It appears whole or not at all, in the place of an
    earlier export.

    Args:
        model: what is written
        tokenizer: its tokenizer
        out: the folder
        format: gpt2, llama or plain; auto: whichever of the first two can
        length: of the sequences that the model was trained on, at which launch.evaluate then takes
            its loss

    Raises:
        ValueError: the format does not express the model, or the folder holds anything else
    """
    # A link stays, and leads to the export.
    folder = Path(os.path.realpath(out))
    format = format if format == PLAIN else choose_format(model.config, format)
    if os.path.lexists(folder) and not is_replaceable(folder):
        raise ValueError(
            f"out={out} exists and is no earlier export; name a new or an empty folder"
        )
    files = files_of_export(model, tokenizer, format)
    mark = MARK | ({LENGTH: str(length)} if length else {})
    try:
        write_whole(folder, tensors_of_export(model, format), mark, files)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out={out} cannot be written ({reason}); make room there, or name another folder"
        ) from None
    return format


def files_of_export(model: GPT, tokenizer: Tokenizer, format: str) -> dict[str, Any]:
    """Returns the content of an export's JSON files by their names."""
    files = to_files(tokenizer, model.config.max_length)
    if format == PLAIN:
        return files | {"gpt.json": asdict(model.config)}
    # A document begins where another ends, or by itself.
    special = {"bos_token_id": tokenizer.prompt("")[0], "eos_token_id": tokenizer.eot}
    return files | {
        "config.json": to_config(model.config, format) | special,
        "generation_config.json": special | {"pad_token_id": tokenizer.eot},
    }


def tensors_of_export(model: GPT, format: str) -> dict[str, Tensor]:
    """Returns the weights of an export by its names."""
    if format == PLAIN:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
    return to_tensors(model, FORMATS[format])


def write_whole(
    folder: Path, tensors: dict[str, Tensor], mark: dict[str, str], files: dict[str, Any]
) -> None:
    """Writes an export that appears whole or not at all, in the place of an earlier one. Raises
    OSError or SafetensorError where the disk refuses."""
    # Beside the folder, and so on its disk: only there is a rename at once.
    partial = folder.with_name(f".{folder.name}.partial")
    # That of an export which was killed may lie there.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial, tensors, mark, files)
        # An earlier export stays until the new one is whole.
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(
    folder: Path, tensors: dict[str, Tensor], mark: dict[str, str], files: dict[str, Any]
) -> None:
    """Writes the weights, with a mark, and the JSON files of an export. Raises OSError or
    SafetensorError where the disk refuses."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata=mark)
    open_as_its_folder(folder / "model.safetensors")
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def is_replaceable(out: Path) -> bool:
    """Returns whether a folder is empty, or an export with nothing beside it and its weights as we
    wrote them."""
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= FILES:
        return False
    try:
        with safe_open(out / "model.safetensors", "pt") as file:
            return MARK.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return not any(out.iterdir())


@dataclass
class Options:
    """Writes a run as a Hugging Face folder, which appears whole or not at all.

    python -m model.export run=runs/NAME out=DIR
    python -m model.export run=runs/NAME out=DIR step=1000 format=plain
    """

    run: str = key(MISSING, "run folder", path=True)
    out: str = key(MISSING, "folder to write", path=True)
    step: int | None = key(None, "step of the checkpoint; default the newest", low=0, high=STEPS)
    format: str = key(
        "auto",
        "auto: gpt2 for LayerNorm and learned positions, llama for RMSNorm, RoPE and SwiGLU; plain:"
        " any model",
        choices=("auto", *FORMATS, PLAIN),
    )


def main(arguments: list[str]) -> None:
    """Exports a run, and says how to load it."""
    from conf.cli import parse, user_errors
    from launch.run.folder import load_config

    with user_errors():
        options, _ = parse(Options, arguments)
        path = checkpoint_path(options.run, options.step)
        model = load(options.run, options.step)
        tokenizer = Tokenizer.load(path)
        length = load_config(Path(options.run)).batch.length
        format = to_hf(model, tokenizer, options.out, options.format, length)
        architecture = "GPT" if format == PLAIN else FORMATS[format].architecture
        print(
            f"{path} -> {options.out}: {architecture}, {model.num_parameters():,} parameters; it"
            " loads by"
        )
        print(how_to_load(options.out, format))


def how_to_load(out: str, format: str) -> str:
    """Returns the lines of Python that load an export."""
    if format == PLAIN:
        shape = f"{out}/gpt.json"
        weights = f"{out}/model.safetensors"
        return (
            f"    model = GPT(GPTConfig(**json.load(open({shape!r}))))\n"
            f"    model.load_state_dict(safetensors.torch.load_file({weights!r}))"
        )
    return (
        f"    AutoModelForCausalLM.from_pretrained({out!r}), AutoTokenizer.from_pretrained({out!r})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
