"""Loading through Transformers: problems that it only warns about are errors here, and dtypes are made equal.

The problems are missing weights and an index that names files outside the folder. Tested with transformers 5.19.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from lmeval_ext.errors import UserError
from lmeval_ext.storage.shard_index import check_index

logger = logging.getLogger(__name__)

# Quantizers compute these if a checkpoint lacks them; Transformers does not fill them with random numbers.
_BESIDE = re.compile(r"(scales?|zero_points?|qzeros|g_idx|inv_freq|absmax|quant_map|quant_state\..*)$")
_BESIDE_DENSE = re.compile(r"inv_freq$")
# Methods (tested) that store all weights under the model's names, so that a name that is missing is a missing weight
_ALL_STORED = (None, "compressed-tensors")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CheckedClass:
    """Replaces a Transformers auto class where the harness calls its `from_pretrained`."""

    def __init__(self, auto_class: Any) -> None:
        self.auto_class = auto_class

    def from_pretrained(self, folder: str, **kwargs: Any) -> Any:
        """Returns the model. Raises UserError if its index names files outside the folder, or weights are missing.

        Transformers would read such files, and fill missing weights with random numbers and a warning.
        """
        place = Path(folder, kwargs.get("subfolder") or "")
        if place.is_dir():
            check_index(place)
        model, report = self.auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
        method = quant_method(model.config)
        beside = _BESIDE if method else _BESIDE_DENSE
        if missing := sorted(name for name in report["missing_keys"] if not beside.search(name)):
            problem = (
                f"pretrained={folder!r} has no {some(missing)}: Transformers would fill them with random numbers. "
                "Download the checkpoint again, or load it as its own kind of model (multimodal=True, another backend=)"
            )
            if method not in _ALL_STORED:
                logger.warning("%s", problem)  # this quantizer may compute them
            else:
                raise UserError(problem)
        return model


def quant_method(config: Any) -> str | None:
    """The quant_method in a model's config; None for a dense model."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    return str(settings["quant_method"]) if settings else None


def some(names: list[str]) -> str:
    """The first three of a list of names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unify_dtype(model: torch.nn.Module) -> None:
    """Casts weights that are decompressed at the first forward to the dtype that the model was loaded in.

    compressed-tensors decompresses FP4 to bfloat16, whatever dtype= says, and matrix products of two dtypes fail. Its
    own hook on the model was registered first, so it has run when this one runs, once.
    """

    def cast(module: torch.nn.Module, _args: Any) -> None:
        handle.remove()
        dtype = getattr(module, "dtype", None)
        for layer in module.modules():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, torch.nn.Parameter) or not hasattr(layer, "quantization_scheme"):
                continue
            if dtype in FLOATS and weight.dtype in FLOATS:
                weight.data = weight.data.to(dtype)

    handle = model.register_forward_pre_hook(cast)
