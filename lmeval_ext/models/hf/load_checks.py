"""What Transformers passes over while loading, made an error: missing weights, files from elsewhere, absent parts.

Tried with transformers 5.19.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.storage.shard_index import check_index

logger = logging.getLogger(__name__)


# Quantizers make these themselves where a checkpoint has none; what Transformers makes of them is no random number.
_BESIDE = re.compile(r"(scales?|zero_points?|qzeros|g_idx|inv_freq|absmax|quant_map|quant_state\..*)$")


_BESIDE_DENSE = re.compile(r"inv_freq$")
# Methods all of whose weights stand in the checkpoint under the model's names, so that a missing one is one (tried).
_ALL_STORED = (None, "compressed-tensors")


class CheckedClass:
    """Stands in for a Transformers auto class where the harness calls its `from_pretrained`."""

    def __init__(self, auto_class: Any) -> None:
        self.auto_class = auto_class

    def from_pretrained(self, folder: str, **kwargs: Any) -> Any:
        """The model. UserError if its index names files outside the folder, or weights are missing.

        Transformers reads the former, and fills the latter with random numbers and a warning.
        """
        place = Path(folder, kwargs.get("subfolder") or "")
        if place.is_dir():
            check_index(place)
        model, report = self.auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
        method = quant_method(model.config)
        beside = _BESIDE if method else _BESIDE_DENSE
        if missing := sorted(name for name in report["missing_keys"] if not beside.search(name)):
            problem = (
                f"pretrained={folder!r} has no {some(missing)}: Transformers puts random numbers there. "
                "Download the checkpoint again, or load it as what it is (multimodal=True, another backend=)"
            )
            if method not in _ALL_STORED:
                logger.warning("%s", problem)  # this quantizer may make them itself
            else:
                raise UserError(problem)
        return model


def quant_method(config: Any) -> str | None:
    """The quant_method of a model's config, None for a dense model."""
    found = getattr(config, "quantization_config", None)
    if found is not None and not isinstance(found, dict):
        found = found.to_dict()
    return str(found["quant_method"]) if found else None


def some(names: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
