"""What Transformers passes over while loading, made an error: missing weights, files from elsewhere, absent parts.

Tried with transformers 5.19.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.storage.checkpoint import check_index

logger = logging.getLogger(__name__)

# Any of these makes a tokenizer; those that are JSON can be looked into.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip


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


def what_is_missing(pretrained: Any, tokenizer: Any = None) -> str | None:
    """Why a local checkpoint folder cannot be loaded, if that can be seen from its small files; None if it cannot.

    tokenizer: the argument of that name; with one, the folder needs no tokenizer of its own.
    """
    folder = Path(pretrained) if isinstance(pretrained, str) else None
    if folder is None or not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        return f"pretrained={pretrained!r}: no config.json there; copy it from where the weights come from"
    if tokenizer:
        return None
    found = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not found:
        return (
            f"pretrained={pretrained!r}: no tokenizer there ({', '.join(_TOKENIZERS[:2])}, …); copy it from the "
            "original model, or name one with tokenizer="
        )
    for path in (*found, folder / "tokenizer_config.json"):
        if path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())
                return f"{path} is not valid JSON ({reason}); download the file again"
            except OSError as error:
                return f"{path} cannot be read ({error.strerror}); check its permissions"
    return None
