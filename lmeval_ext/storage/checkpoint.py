"""A Hugging Face checkpoint folder: its config.json, its quantization config, its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmeval_ext.storage.decoder import Facts
from lmeval_ext.storage.files import path_inside
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError
from lmeval_ext.storage.json_file import read_object
from lmeval_ext.storage.roles import of_another_modality
from lmeval_ext.storage.shards import read_tensors
from lmeval_ext.storage.tensors import Header, TensorTable

# Keys by which a config says that the token embedding is the output matrix (Mamba, OLMo and Molmo have their own).
TIE_KEYS = ("tie_word_embeddings", "tie_embeddings", "weight_tying")
GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Architectures that take images or sound, unless an encoder of text stands before their decoder.
MULTIMODAL = ("ForConditionalGeneration", "ForVision2Seq", "ForImageTextToText", "ForMultimodalLM")
QUANTO_MAP = "quanto_qmap.json"  # optimum-quanto's: by module, the types of weights and activations
# Keys under which a composite config of transformers keeps the language model's config.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass
class Checkpoint:
    """The headers and configs of one checkpoint folder.

    tensors: by name. config: config.json, {} without one. quantization: the quantization config, {} without one.
    precision: the one to count of a checkpoint that holds several; None: all of them.
    """

    tensors: TensorTable
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    precision: int | None = None

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
        return _count(self.text_config, {}, "num_hidden_layers")

    @property
    def context_length(self) -> int | None:
        """Return `max_position_embeddings` of the language model, in tokens, None if the config does not have it.

        `compare.run.specs.paths.trained_context` is the other package's own copy of this rule; a test compares them.
        """
        return _count(self.text_config, {}, "max_position_embeddings")

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
        # BLT and other models of bytes have patches of text.
        other = any(value and of_another_modality([key]) for key, value in self.config.items() if "patch" not in key)
        composite = any(name.endswith(MULTIMODAL) for name in self._architectures)
        return Facts(
            layers=self.layers,
            vocabulary=_count(self.text_config, self.config, "vocab_size"),
            hidden=_count(self.text_config, self.config, "hidden_size"),
            multimodal=other or (composite and not encoder),
            encoder_decoder=encoder,
            transforms=bool(self.quantization.get("transform_config")),
            quantization=self.quantization,
            precision=self.precision,
        )

    @property
    def _architectures(self) -> list[str]:
        names = self.config.get("architectures")
        return list(map(str, names)) if isinstance(names, list) else []


def architecture(path: Path) -> str | None:
    """Return the decoder's `model_type` in a checkpoint's config.json, None without one.

    A decoder has the same name alone and in a multimodal wrapper. A GGUF file has none: llama.cpp's names are others.
    """
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf" or not (folder / "config.json").exists():
        return None
    try:
        checkpoint = read_config(folder)
    except (StorageError, OSError):
        return None
    name = checkpoint.text_config.get("model_type") or checkpoint.config.get("model_type")
    return name.removesuffix("_text") if isinstance(name, str) and name else None


def _count(text: dict[str, Any], config: dict[str, Any], key: str) -> int | None:
    """Return a positive number of the language model's config, or of the whole config if it is only there."""
    value = text.get(key, config.get(key))
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_checkpoint(path: Path, headers: Sequence[Header] | None = None) -> Checkpoint:
    """Read the headers of a checkpoint folder, or of one .safetensors file and all other shards of its checkpoint.

    headers: of its tensors, where they are in files of another kind.

    Raises StorageError for files that are missing, damaged or hostile.
    """
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    tensors = read_tensors(path, notes) if headers is None else TensorTable(headers)
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
        parameters = config["quip_params"] if isinstance(config["quip_params"], dict) else {}
        return {**parameters, "quant_method": "qtip" if "td_x" in parameters else "quip"}
    if quantization is None and isinstance(config.get("anyprec"), dict):
        return {**config["anyprec"], "quant_method": "anyprec"}
    for name in ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json"):
        if quantization is None and (folder / name).exists():
            quantization = read_object(path_inside(folder, name), constants=True)
            method = {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(name)
            quantization.setdefault("quant_method", method)
    if quantization is None and (folder / QUANTO_MAP).exists():
        quantization = {"quant_method": "quanto", "modules": read_object(path_inside(folder, QUANTO_MAP))}
    if quantization is not None and not isinstance(quantization, dict):
        raise StorageError(f"{folder / 'config.json'}: quantization_config is not an object. {DOWNLOAD_AGAIN}")
    return quantization or {}
