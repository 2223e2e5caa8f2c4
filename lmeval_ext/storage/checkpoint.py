"""A Hugging Face checkpoint folder: which files belong to it, its config.json, its tensors.

Files that an untrusted checkpoint names are opened only inside the checkpoint (`path_inside`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from lmeval_ext.storage.decoder import Facts
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, parts_missing
from lmeval_ext.storage.json_file import read_object
from lmeval_ext.storage.roles import of_another_modality
from lmeval_ext.storage.safetensors_header import read_header
from lmeval_ext.storage.tensors import Header, TensorTable

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"^(.*)-(\d{5,})-of-(\d{5,})\.safetensors$")
# The files that ExLlamaV2's converter writes (0.3.2, conversion/compile.py). The converter also copies every other file
# of the original, including its index, which names files that the converted folder does not have.
EXL2_FILE = re.compile(r"^output(-\d{5,}-of-\d{5,})?\.safetensors$")
# Keys by which a config says that the token embedding is the output matrix (Mamba, OLMo and Molmo have their own).
TIE_KEYS = ("tie_word_embeddings", "tie_embeddings", "weight_tying")
GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Architectures that take images or sound, unless an encoder of text stands before their decoder.
MULTIMODAL = ("ForConditionalGeneration", "ForVision2Seq", "ForImageTextToText", "ForMultimodalLM")
# Keys under which a composite config of transformers keeps the language model's config.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass
class Checkpoint:
    """The headers and configs of one checkpoint folder.

    tensors: by name. config: config.json, {} without one. quantization: the quantization config, {} without one.
    """

    tensors: TensorTable
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def text_config(self) -> dict[str, Any]:
        """Return the language model's part of the config."""
        config = self.config
        for _ in range(2):  # thinker_config holds a text_config
            config = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
        return config

    @property
    def layers(self) -> int | None:
        """Return `num_hidden_layers` of the language model, None if the config does not have it."""
        count = self.text_config.get("num_hidden_layers")
        return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None

    @property
    def tied(self) -> bool | None:
        """Return whether the token embedding is the output matrix where none is stored; None if unknown."""
        values = [config.get(key) for config in (self.config, self.text_config) for key in TIE_KEYS]
        flags = [value for value in values if isinstance(value, bool)]
        if flags:
            return any(flags)
        # A generating model needs an output matrix, so a config.json without the flag means the default, "tied".
        return True if any(name.endswith(GENERATING) for name in self._architectures) else None

    @property
    def facts(self) -> Facts:
        """Return what the config says of the decoder."""
        encoder = any(config.get("is_encoder_decoder") is True for config in (self.config, self.text_config))
        other = any(value and of_another_modality([key]) for key, value in self.config.items())
        composite = any(name.endswith(MULTIMODAL) for name in self._architectures)
        return Facts(
            layers=self.layers,
            vocabulary=_count(self.text_config, self.config, "vocab_size"),
            hidden=_count(self.text_config, self.config, "hidden_size"),
            multimodal=other or (composite and not encoder),
            encoder_decoder=encoder,
            transforms=bool(self.quantization.get("transform_config")),
        )

    @property
    def _architectures(self) -> list[str]:
        names = self.config.get("architectures")
        return list(map(str, names)) if isinstance(names, list) else []


def _count(text: dict[str, Any], config: dict[str, Any], key: str) -> int | None:
    value = text.get(key, config.get(key))
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder, or of one .safetensors file and all other shards of its checkpoint.

    Raises StorageError for files that are missing, damaged or hostile.
    """
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    tensors = TensorTable(_headers(folder, _only_file(path, folder, notes), notes))
    if not tensors:
        raise StorageError(f"{path} holds no tensors. Give the folder of a complete checkpoint.")
    config: dict[str, Any] = {}
    if (folder / "config.json").exists():
        config = read_object(path_inside(folder, "config.json"), constants=True)
    else:
        notes.append("no config.json: draft layers, tied embeddings and the scheme are judged by the tensors alone")
    return Checkpoint(tensors, config, _quantization(folder, config), notes)


def read_config(folder: Path) -> Checkpoint:
    """Read config.json and the quantization config of a folder, without the tensors.

    Raises StorageError if config.json is missing or cannot be read.
    """
    config = read_object(path_inside(folder, "config.json"), constants=True)
    return Checkpoint(TensorTable([]), config, _quantization(folder, config))


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization config from config.json or from a quantizer's own file; {} if there is none."""
    quantization = config.get("quantization_config")
    for key in TEXT_CONFIGS:
        if quantization is None and isinstance(config.get(key), dict):
            quantization = config[key].get("quantization_config")
    if quantization is None:
        quantization = config.get("compression_config")  # compressed-tensors before 0.9
    if quantization is None and "quip_params" in config:
        return {"quant_method": "qtip" if "td_x" in str(config["quip_params"]) else "quip"}
    for name in ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json"):
        if quantization is None and (folder / name).exists():
            quantization = read_object(path_inside(folder, name), constants=True)
            method = {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(name)
            quantization.setdefault("quant_method", method)
    if quantization is not None and not isinstance(quantization, dict):
        raise StorageError(f"{folder / 'config.json'}: quantization_config is not an object. {DOWNLOAD_AGAIN}")
    return quantization or {}


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file.

    Raises StorageError if the name, or a link, leads out of the checkpoint. Links into the `blobs` folder beside
    `snapshots` are allowed: that is the layout of the Hugging Face cache.
    """
    _check_plain(folder, name)
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise StorageError(f"{path} is a circular link. Replace it with the file.") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise StorageError(f"{path} is a link out of the checkpoint, to {target}. Replace it with the file.")
    if target.exists() and not target.is_file():
        raise StorageError(f"{path} is not a regular file. Give the folder of a complete checkpoint.")
    return path


def check_index(folder: Path) -> None:
    """Raise StorageError if the shard index cannot be read, or names a file outside the folder.

    Protects engines that would open such a file. No weight file is opened here; `path_inside` checks links.
    """
    if (folder / INDEX).exists():
        for name in _index_files(folder).values():
            _check_plain(folder, name)


def _check_plain(folder: Path, name: str) -> None:
    if not name or name in (".", "..") or re.search(r"[/\\:\x00]", name) or not _encodable(name):
        raise StorageError(
            f"{folder}: the file name {name[:200]!r} in the shard index is not a plain name in this folder. "
            "Do not trust this checkpoint. Download it again from its source."
        )


def _encodable(name: str) -> bool:
    """Return whether the file system can hold the name; a name from JSON may contain a lone surrogate."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _only_file(path: Path, folder: Path, notes: list[str]) -> Path | None:
    """Return the one file to read; None for a sharded checkpoint, whose files the index or the shard names give."""
    if path.is_dir():
        return None
    if SHARD.match(path.name):
        notes.append(f"{path.name} is one shard: the whole checkpoint in its folder was read")
        return None
    return path


def _headers(folder: Path, only: Path | None, notes: list[str]) -> list[Header]:
    """Read the headers of the checkpoint's files; only: the one file to read."""
    if only is not None:
        return _merge([only])
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if (folder / INDEX).exists():
        if not _is_copied_index(folder, names):
            return _indexed(folder, notes)
        notes.append(f"{INDEX} is the original's, copied by ExLlamaV2's converter: not used")
    if "model.safetensors" in names:
        return _merge([path_inside(folder, "model.safetensors")])
    shards = [match for name in names if (match := SHARD.match(name))]
    if shards:
        return _merge(_complete(folder, shards))
    if len(names) == 1:
        return _merge([path_inside(folder, names[0])])
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


def _is_copied_index(folder: Path, names: list[str]) -> bool:
    """Return whether the index is the original's: it names none of the weight files, and ExLlamaV2 wrote these."""
    return bool(names) and all(map(EXL2_FILE.match, names)) and not set(names) & set(_index_files(folder).values())


def _complete(folder: Path, shards: list[re.Match[str]]) -> list[Path]:
    """Return the paths of all shards, from the numbers in their names. Raises StorageError if one is missing."""
    stems = {(match[1], match[3]) for match in shards}
    if len(stems) > 1:
        raise StorageError(f"{folder} holds shards of several checkpoints and no {INDEX}. Keep the shards of one.")
    ((stem, total),) = stems
    if int(total) > 100_000:
        raise StorageError(f"{folder}: a shard name announces {int(total):,} shards. Download the checkpoint again.")
    names = [f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    return _present(folder, names)


def _present(folder: Path, names: list[str]) -> list[Path]:
    """Return the paths of the named files. Raises StorageError if one is missing or outside the checkpoint."""
    paths = [path_inside(folder, name) for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise parts_missing(folder, missing, len(names), "shards")
    return paths


def _indexed(folder: Path, notes: list[str]) -> list[Header]:
    """Read the shards that the index names; each tensor comes from the shard that the index gives for it."""
    index, files = folder / INDEX, _index_files(folder)
    names = sorted(set(files.values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        path_inside(folder, others[0])
        raise StorageError(f"{index} names {others[0][:200]!r}, which is not a safetensors file. {DOWNLOAD_AGAIN}")
    headers = []
    unlisted = 0
    for path in _present(folder, names):
        header = read_header(path)
        shards = list(map(files.get, header.names))
        if shards.count(path.name) != len(shards):
            unlisted += shards.count(None)
            header = _selected(header, [shard in (None, path.name) for shard in shards])
        headers.append(header)
    if unlisted or sum(map(len, headers)) != len(files):
        stored = _check_unique(headers)
        if absent := [name for name in files if name not in stored]:
            raise StorageError(
                f"{folder / files[absent[0]]} lacks {absent[0][:200]!r}, which it holds by {INDEX} "
                f"({len(absent)} tensors in all). The files have different versions: download the checkpoint again."
            )
    if unlisted:
        notes.append(f"{unlisted} tensors stand in the shards but not in {INDEX}; they are counted")
    return headers


def _selected(header: Header, chosen: list[bool]) -> Header:
    """Return the chosen tensors of a file."""
    names, forms, offsets = (
        list(compress(header.names, chosen)),
        list(compress(header.forms, chosen)),
        list(compress(header.offsets, chosen)),
    )
    return Header(header.path, names, forms, offsets)


def _index_files(folder: Path) -> dict[str, str]:
    """Return the file names by tensor, as the index has them. The names are not checked."""
    index = path_inside(folder, INDEX)
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise StorageError(f"{index} has no weight_map of tensor names to file names. {DOWNLOAD_AGAIN}")
    return files


def _merge(paths: list[Path]) -> list[Header]:
    headers = [read_header(path) for path in paths]
    if len(headers) > 1:
        _check_unique(headers)
    return headers


def _check_unique(headers: list[Header]) -> set[str]:
    """Return the names of all tensors. Raises StorageError if two shards give a tensor of the same name."""
    names: set[str] = set()
    for header in headers:
        if not names.isdisjoint(header.names):
            name = next(name for name in header.names if name in names)
            raise StorageError(f"{header.path}: tensor {name[:200]!r} is also in another shard. {DOWNLOAD_AGAIN}")
        names.update(header.names)
    return names
