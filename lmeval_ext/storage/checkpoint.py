"""A Hugging Face checkpoint folder: which files belong to it, its config, all its tensors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.json_file import read_object
from lmeval_ext.storage.safetensors_header import read_header
from lmeval_ext.storage.tensors import StoredTensor

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"^(.*)-(\d{5,})-of-(\d{5,})\.safetensors$")
# What ExLlamaV2's converter writes (0.3.2, conversion/compile.py). It copies every other file of the original beside
# it, and with them the original's index, which names files that are not there.
EXL2_FILE = re.compile(r"^output(-\d{5,}-of-\d{5,})?\.safetensors$")
# Where wrappers keep the language model's own config (transformers' composite configs).
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass
class Checkpoint:
    """config: config.json ({} without one); quantization: the quantization config ({} if none)."""

    tensors: dict[str, StoredTensor]
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config."""
        config = self.config
        for _ in range(2):  # thinker_config holds a text_config
            config = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
        return config

    @property
    def layers(self) -> int | None:
        """`num_hidden_layers` of the language model, None if the config does not say."""
        count = self.text_config.get("num_hidden_layers")
        return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None

    @property
    def tied(self) -> bool | None:
        """Whether the output matrix, where none is stored, is the token embedding; None if nothing says so."""
        said = [config.get("tie_word_embeddings") for config in (self.config, self.text_config)]
        flags = [flag for flag in said if isinstance(flag, bool)]
        if flags:
            return any(flags)
        names = self.config.get("architectures")
        heads = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
        # A generating model cannot do without an output matrix: where config.json is silent the default was "tied".
        return True if isinstance(names, list) and any(str(name).endswith(heads) for name in names) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder, or of one .safetensors file (with all its sister shards)."""
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    tensors = _tensors(folder, _only_file(path, folder, notes), notes)
    if not tensors:
        raise StorageError(f"{path} holds no tensors. Give a folder that holds a whole checkpoint.")
    config: dict[str, Any] = {}
    if (folder / "config.json").exists():
        config = read_object(inside(folder, "config.json"))
    else:
        notes.append("no config.json: draft layers, tied embeddings and the scheme are judged by the tensors alone")
    return Checkpoint(tensors, config, _quantization(folder, config), notes)


def read_config(folder: Path) -> Checkpoint:
    """config.json of a folder and what it says of quantization, without the tensors; StorageError if unreadable."""
    config = read_object(inside(folder, "config.json"))
    return Checkpoint({}, config, _quantization(folder, config))


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    for key in TEXT_CONFIGS:
        if found is None and isinstance(config.get(key), dict):
            found = config[key].get("quantization_config")
    if found is None:
        found = config.get("compression_config")  # compressed-tensors before 0.9
    if found is None and "quip_params" in config:
        return {"quant_method": "qtip" if "td_x" in str(config["quip_params"]) else "quip"}
    for name in ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json"):
        if found is None and (folder / name).exists():
            found = read_object(inside(folder, name))
            found.setdefault("quant_method", {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(name))
    if found is not None and not isinstance(found, dict):
        raise StorageError(f"{folder / 'config.json'}: quantization_config is not an object. Download the file again.")
    return found or {}


def inside(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file; StorageError if the name, or a link, leads out of the checkpoint.

    Links into the `blobs` folder beside `snapshots`, the layout of the Hugging Face cache, are part of it.
    """
    _check_plain(folder, name)
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise StorageError(f"{path} is a link in circles. Replace it with the file itself.") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise StorageError(f"{path} is a link out of the checkpoint, to {target}. Put the file itself there.")
    if target.exists() and not target.is_file():
        raise StorageError(f"{path} is not a regular file. Give a folder that holds a whole checkpoint.")
    return path


def check_index(folder: Path) -> None:
    """StorageError if the folder's shard index cannot be read, or names a file that is not in the folder itself.

    For engines that would follow such a name. No weight file is opened, and links are left to `inside`.
    """
    if (folder / INDEX).exists():
        for name in _index_files(folder).values():
            _check_plain(folder, name)


def _check_plain(folder: Path, name: str) -> None:
    if not name or name in (".", "..") or re.search(r"[/\\:\x00]", name) or not _encodable(name):
        raise StorageError(
            f"{folder}: the file name {name[:200]!r} in the shard index is not a plain name in this folder. "
            "Do not trust this checkpoint; download it from its source again."
        )


def _encodable(name: str) -> bool:
    """Whether the file system can hold the name: JSON may hold half a character (a lone surrogate)."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _only_file(path: Path, folder: Path, notes: list[str]) -> Path | None:
    """The one file to read, None for a sharded checkpoint (then the index or the shard names say which)."""
    if path.is_dir():
        return None
    if SHARD.match(path.name):
        notes.append(f"{path.name} is one shard: the whole checkpoint in its folder was read")
        return None
    return path


def _tensors(folder: Path, only: Path | None, notes: list[str]) -> dict[str, StoredTensor]:
    if only is not None:
        return _merge([only])
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if (folder / INDEX).exists():
        if not _of_the_original(folder, names):
            return _indexed(folder, notes)
        notes.append(f"{INDEX} is the original's, copied by ExLlamaV2's converter: not used")
    if "model.safetensors" in names:
        return _merge([inside(folder, "model.safetensors")])
    shards = [match for name in names if (match := SHARD.match(name))]
    if shards:
        return _merge(_complete(folder, shards))
    if len(names) == 1:
        return _merge([inside(folder, names[0])])
    if names:
        raise StorageError(
            f"{folder} holds {len(names)} safetensors files and no {INDEX}. Name one of: {', '.join(names)}."
        )
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise StorageError(
            f"{folder} holds only pickle files ({pickles[0]}), which can run code and are never opened. "
            "Convert the checkpoint to safetensors (transformers: save_pretrained) or download a safetensors revision."
        )
    raise StorageError(f"{folder} holds no .safetensors file and no .gguf file. Give the folder of a checkpoint.")


def _of_the_original(folder: Path, names: list[str]) -> bool:
    """Whether the index names none of the folder's weight files, and these are ExLlamaV2's."""
    return bool(names) and all(map(EXL2_FILE.match, names)) and not set(names) & set(_index_files(folder).values())


def _complete(folder: Path, shards: list[re.Match[str]]) -> list[Path]:
    stems = {(match[1], match[3]) for match in shards}
    if len(stems) > 1:
        raise StorageError(f"{folder} holds shards of several checkpoints and no {INDEX}. Keep one of them there.")
    ((stem, total),) = stems
    if int(total) > 100_000:
        raise StorageError(f"{folder}: a shard name announces {int(total):,} shards. Download the checkpoint again.")
    wanted = [f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    return _present(folder, wanted)


def _present(folder: Path, names: list[str]) -> list[Path]:
    paths = [inside(folder, name) for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise StorageError(f"{folder}: {len(missing)} of {len(names)} shards are missing ({shown}). Download them.")
    return paths


def _indexed(folder: Path, notes: list[str]) -> dict[str, StoredTensor]:
    index, files = folder / INDEX, _index_files(folder)
    names = sorted(set(files.values()))
    if wrong := [name for name in names if not name.endswith(".safetensors")]:
        inside(folder, wrong[0])
        raise StorageError(
            f"{index} names {wrong[0][:200]!r}, which is not a safetensors file. Download the file again."
        )
    tensors: dict[str, StoredTensor] = {}
    unlisted = 0
    for path in _present(folder, names):
        for tensor in read_header(path):
            unlisted += tensor.name not in files
            if files.get(tensor.name, path.name) == path.name:
                if tensor.name in tensors:
                    raise StorageError(
                        f"{path}: tensor {tensor.name[:200]!r} also stands in another shard. Download again."
                    )
                tensors[tensor.name] = tensor
    if absent := [name for name in files if name not in tensors]:
        raise StorageError(
            f"{folder / files[absent[0]]} lacks {absent[0][:200]!r}, which {INDEX} says it holds "
            f"({len(absent)} tensors in all). The files are of different versions: download the checkpoint again."
        )
    if unlisted:
        notes.append(f"{unlisted} tensors stand in the shards but not in {INDEX}; they are counted")
    return tensors


def _index_files(folder: Path) -> dict[str, str]:
    """File names by tensor, as the index has them; none of them is checked."""
    index = inside(folder, INDEX)
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise StorageError(f"{index} has no weight_map of tensor names to file names. Download the file again.")
    return files


def _merge(paths: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise StorageError(
                    f"{path}: tensor {tensor.name[:200]!r} also stands in another shard. Download again."
                )
            tensors[tensor.name] = tensor
    return tensors
