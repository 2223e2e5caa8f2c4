"""Loading through Transformers: what it only warns about is an error here (checks.py).

Tested with transformers 5.19 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.hf.activations import asks_for_activations, decoded_by_transformers, weight_only_note
from lmeval_ext.models.hf.checks import LoadedModel, some
from lmeval_ext.models.hf.landing import Landing
from lmeval_ext.models.loading import local_checkpoint
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_checkpoint
from lmeval_ext.storage.schemes import method_of
from lmeval_ext.storage.shard_index import check_index
from lmeval_ext.storage.tensors import StoredTensor


class CheckedClass:
    """Replaces a Transformers auto class where the harness calls its `from_pretrained`.

    auto_class: the auto class itself. config: the checkpoint's config. notes: for the result file, about the model that
    was loaded. decoded: whether Transformers has decoded quantized weights to dense ones.
    """

    def __init__(self, auto_class: Any, config: Any) -> None:
        self.auto_class, self.config = auto_class, config
        self.notes: list[str] = []
        self.decoded = False

    def from_pretrained(self, folder: str, **kwargs: Any) -> Any:
        """Returns the model. Raises UserError if its index names files outside the folder, or if it is not whole."""
        place = Path(folder, kwargs.get("subfolder") or "")
        if place.is_dir():
            check_index(place)
        settings = quantization_settings(self.config)
        if settings and not _known_to_transformers(settings):
            raise UserError(
                f"pretrained={folder!r}: config.json says quant_method {settings.get('quant_method')!r}, which this "
                "Transformers does not know; it would load the codes as if they were weights. Run it with an engine "
                "that knows the format"
            )
        with Landing() as landing:
            model, report = self.auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
        gguf = bool(kwargs.get("gguf_file"))
        tensors = None if gguf else _tensors(folder, kwargs)
        stored, running = (None if gguf else method_of(settings)), quant_method(model.config)
        loaded = LoadedModel(folder, model, report, landing, tensors, stored, running, settings)
        self.notes += loaded.check()
        codes = loaded.decoded_modules()
        decoded = decoded_by_transformers(model, codes)
        if decoded and asks_for_activations(settings):
            matrices = (
                "the weights"
                if len(decoded) == len(codes)
                else f"{len(decoded)} of {len(codes)} weights ({some(decoded)})"
            )
            self.notes.append(weight_only_note("Transformers", matrices))
        self.decoded = bool(codes) and running is None
        return model


def _tensors(folder: str, kwargs: Mapping[str, Any]) -> Mapping[str, StoredTensor] | None:
    """The checkpoint's tensors by name; None if its weights are not safetensors."""
    path = local_checkpoint(folder, kwargs.get("revision"))
    if path is None:
        return None
    try:
        return read_checkpoint(Path(path, kwargs.get("subfolder") or "")).tensors
    except StorageError:
        if kwargs.get("use_safetensors"):
            raise
        return None


def _known_to_transformers(settings: dict[str, Any]) -> bool:
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        return bool(AutoHfQuantizer.supports_quant_method(settings))
    except ValueError:  # no quant_method at all
        return False


def quantization_settings(config: Any) -> dict[str, Any]:
    """The quantization config in a model's config, as a dictionary; {} for a dense model.

    As in Transformers, that of the text part counts where the whole has none.
    """
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return settings if isinstance(settings, dict) else dict(settings.to_dict())
    return {}


def quant_method(config: Any) -> str | None:
    """The quantization method that a model's config names, as in checkpoints ("awq"); None for a dense model.

    Transformers keeps it as a member of an enum, which Python prints as "QuantizationMethod.AWQ".
    """
    return method_of(quantization_settings(config))
