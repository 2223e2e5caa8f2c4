"""EXL3 and EXL2 checkpoints in Transformers, which knows neither: they are decoded to dense weights at load.

Tested with transformers 5.19. The dense weights go through `from_pretrained(None, config=…, state_dict=…)`, so that
Transformers renames, stacks experts and places tensors as it does for the unquantized checkpoint.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from lmeval_ext.decoding.checkpoint import decoded
from lmeval_ext.errors import UserError
from lmeval_ext.models.hf.loading import some

NOTE = "decoded to dense weights at load: sizes are those of the checkpoint, not of what ran"


class DecodingClass:
    """Replaces a Transformers auto class where the harness calls its `from_pretrained`.

    auto_class: the auto class itself. config: the checkpoint's config. device: where to decode. notes: for the result
    file, about the model that was loaded.
    """

    def __init__(self, auto_class: Any, config: Any, device: torch.device) -> None:
        self.auto_class, self.config, self.device = auto_class, config, device
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
        state = decoded(folder, dtype, "cpu" if spread else self.device, shapes)
        if "lm_head.weight" in state:  # the formats store it even if it is tied in the original
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        for name in ("revision", "gguf_file", "subfolder", "quantization_config"):
            kwargs.pop(name, None)  # they would make Transformers look for a checkpoint
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
        )
        _check(report, folder)
        if unused := sorted(report["unexpected_keys"]):  # vision towers and draft layers, as for any checkpoint
            self.notes.append(f"{len(unused)} tensors have no place in Transformers' model: {some(unused)}")
        return model


def dense_config(config: Any) -> Any:
    """A copy of a config without its quantization."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _check(report: dict[str, Any], folder: str) -> None:
    """Raises UserError if weights are missing: Transformers fills them with random numbers and only warns."""
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder} has no {some(missing)}: it is incomplete, or ExLlama lays this architecture out differently "
            "from Transformers; then run it with exllamav3 or exllamav2 on a GPU"
        )
