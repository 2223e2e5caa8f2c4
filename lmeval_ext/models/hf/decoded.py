"""Checkpoints that Transformers cannot run, or misreads: they are decoded to dense weights at load.

Which ones: `lmeval_ext.decoding.formats`.

Tested with transformers 5.19. The dense weights go through `from_pretrained(None, config=…, state_dict=…)`, so that
Transformers renames, stacks experts and places tensors as it does for the unquantized checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download

from lmeval_ext.decoding import activations
from lmeval_ext.decoding.checkpoint import decoded, source_of, tensors_decide
from lmeval_ext.errors import UserError
from lmeval_ext.models.hf.checks import beside_the_model, some
from lmeval_ext.storage.roles import BUFFERS, CACHE_SCALE

QUANTIZER_FILE = "hf_quant_config.json"
NOTE = "decoded to dense weights at load: sizes are those of the checkpoint, not of what ran"


class DecodingClass:
    """Replaces a Transformers auto class where the harness calls its `from_pretrained`.

    auto_class: the auto class itself. config: the checkpoint's config. device: where to decode. options: of `decoded`.
    notes: for the result file, about the model that was loaded. decoded: as in `CheckedClass`.
    """

    decoded = True

    def __init__(self, auto_class: Any, config: Any, device: torch.device, **options: Any) -> None:
        self.auto_class, self.config, self.device, self.options = auto_class, config, device, options
        self.notes = [NOTE]

    def from_pretrained(self, folder: str, *, dtype: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        """Returns the model with decoded weights. Raises UserError if weights are missing.

        dtype "auto" is float32 on a CPU and float16 elsewhere, whatever the config says: bfloat16 would round the
        values that the formats hold. Other arguments go to Transformers.
        """
        if kwargs.get("quantization_config") is not None:
            raise UserError(f"{folder}: a decoded checkpoint cannot be quantized again; drop quantization_config=")
        if dtype == "auto":
            dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        config = self.config
        with torch.device("meta"):
            skeleton = self.auto_class.from_config(config, trust_remote_code=trust_remote_code)
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        model_class, config = type(skeleton), skeleton.config
        spread = kwargs.get("device_map") == "auto" or kwargs.get("tp_plan") is not None
        state = decoded(folder, dtype, "cpu" if spread else self.device, shapes, **self.options)
        if "lm_head.weight" in state:  # the formats store it even if it is tied in the original
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        for name in ("revision", "gguf_file", "subfolder", "quantization_config"):
            kwargs.pop(name, None)  # they would make Transformers look for a checkpoint
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
        )
        _check(report, folder, config)
        if unused := sorted(report["unexpected_keys"]):  # vision towers and draft layers, as for any checkpoint
            self.notes.append(f"{len(unused)} tensors have no place in Transformers' model: {some(unused)}")
        if source := source_of(Path(folder)):
            self.notes += activations.notes(*source)
        return model


def with_deciding_files(name: str, revision: str | None, folder: str, place: str) -> str:
    """The folder of a hub checkpoint, of which config.json is there, with all files that decide if it is decoded.

    name: of the checkpoint on the hub. folder: its snapshot in the cache. place: subfolder of it.
    """
    with contextlib.suppress(Exception):  # most have none; ModelOpt's older exports have nothing in config.json
        hf_hub_download(name, QUANTIZER_FILE, revision=revision, subfolder=place or None)
    return str(snapshot_download(name, revision=revision)) if tensors_decide(Path(folder, place)) else folder


def dense_config(config: Any) -> Any:
    """A copy of a config without its quantization."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config", "quip_params", "anyprec"):
            if hasattr(part, name):
                delattr(part, name)
    return config


def _check(report: dict[str, Any], folder: str, config: Any) -> None:
    """Raises UserError if weights are missing or left over.

    Transformers fills missing ones with random numbers and only warns; one that is left over may be a renamed one.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder} has no {some(missing)}: it is incomplete, or its quantizer lays this architecture out "
            "differently from Transformers; then run it with the quantizer's own engine"
        )
    if strange := sorted(name for name in report["unexpected_keys"] if not _needless(name, config)):
        raise UserError(
            f"{folder}: Transformers' model has no place for {some(strange)}: the checkpoint is of another model than "
            "its config.json says, or a tensor was renamed"
        )


def _needless(name: str, config: Any) -> bool:
    """Whether a language model runs without a tensor: a buffer, or of a cache, a vision tower or a draft layer."""
    return bool(BUFFERS.search(name) or CACHE_SCALE.search(name)) or beside_the_model(name, config)
