"""Whether a loaded model holds what its checkpoint stores: each gap is an error that names the tensors.

Transformers warns and goes on: it drops tensors without a place, fills places without a tensor with random numbers, and
puts codes into dense weights as if they were numbers. Every score would then be of another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from safetensors import safe_open

from lmeval_ext.errors import UserError
from lmeval_ext.models.hf.landing import Landing
from lmeval_ext.models.hf.layouts import ACTIVATION, SIDE, codes_without_sides, payloads, sides_of_dense_weights
from lmeval_ext.storage.roles import BUFFERS, CACHE_SCALE, DRAFTS, of_another_modality
from lmeval_ext.storage.safetensors_header import FLOATS
from lmeval_ext.storage.tensors import StoredTensor

# Places that a checkpoint need not fill, because their values follow from the config. By method; None: every method.
COMPUTED: dict[str | None, re.Pattern[str]] = {
    None: re.compile(r"(^|\.)inv_freq$"),
}
# Whose loaded weights have other shapes than the model's empty ones, by design
RESHAPING = ("bitsandbytes", "torchao", "quanto", "hqq", "mxfp4", "higgs", "eetq")
_OTHER_WAYS = (
    "run it with another engine (vllm_nvfp4), or load it as its own kind of model (multimodal=True, another backend=)"
)


def some(names: Iterable[str]) -> str:
    """The first three of some names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def beside_the_model(name: str, config: Any) -> bool:
    """Whether a tensor is of a vision tower or a draft layer, without which a language model runs.

    DeepSeek and others store their draft layers behind the model's own.
    """
    parts = name.split(".")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    number = next((int(part) for part in parts if part.isdecimal()), None)
    behind = isinstance(layers, int) and number is not None and number >= layers
    return bool(DRAFTS.search(name)) or behind or of_another_modality(parts)


class LoadedModel:
    """A model that Transformers has loaded, and what is known of how it did.

    folder: for messages. tensors: the checkpoint's tensors by name; None if they are not in safetensors files.
    stored, running: the quantization method of the checkpoint and of the model, None for dense ones. report:
    Transformers' loading info.
    """

    def __init__(
        self,
        folder: str,
        model: Any,
        report: Mapping[str, Any],
        landing: Landing,
        tensors: Mapping[str, StoredTensor] | None,
        stored: str | None,
        running: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.model, self.report, self.landing = folder, model, report, landing
        self.tensors, self.stored, self.running, self.settings = tensors, stored, running, settings

    def check(self) -> list[str]:
        """Notes for the result file. Raises UserError for the first gap that changes the model."""
        self._codes_have_their_scales()
        self._nothing_made_up()
        notes = self._nothing_dropped()
        self._shapes_agree()
        return notes

    def _error(self, problem: str, advice: str) -> UserError:
        return UserError(f"pretrained={self.folder!r}: {problem}; {advice}")

    # ------------------------------------------------------------------ codes in dense weights

    def _codes_have_their_scales(self) -> None:
        if self.tensors is None:
            return
        unused = set(self.report["unexpected_keys"])
        integers = {
            name.rpartition(".")[2]
            for name, tensor in self.model.state_dict().items()
            if not tensor.is_floating_point()
        }
        for name, lacking in codes_without_sides(self.tensors, self.stored).items():
            if name in unused or name.rpartition(".")[2] in integers - {"weight"}:
                continue
            dtype = self.tensors[name].dtype
            if lacking:
                raise self._error(
                    f"{name} is stored as {dtype}, and {some(lacking)} is missing", "get the complete checkpoint"
                )
            if self.stored is None:
                raise self._error(
                    f"{name} is stored as {dtype}, but config.json has no quantization_config to decode it by",
                    "copy the checkpoint's original config.json, or run it with an engine that knows the format",
                )
            raise self._error(
                f"{name} is stored as {dtype}, which is not how {self.stored} checkpoints store a weight", _OTHER_WAYS
            )

        if scales := sides_of_dense_weights(self.tensors, self.stored):
            raise self._error(f"{some(scales)} is stored beside a dense weight, which has no scale", _OTHER_WAYS)

    # ------------------------------------------------------------------ places without a tensor

    def _nothing_made_up(self) -> None:
        computed = [COMPUTED[method] for method in (None, self.running) if method in COMPUTED]
        missing = [name for name in self.report["missing_keys"] if not any(c.search(name) for c in computed)]
        if self.running in ("gptq", "auto-round") and not self.settings.get("desc_act"):
            missing = [name for name in missing if not name.endswith(".g_idx")]  # groups in order
        if missing:
            raise self._error(
                f"it has no {some(missing)}, which Transformers would fill with random numbers",
                f"complete the checkpoint, or {_OTHER_WAYS}",
            )

    # ------------------------------------------------------------------ tensors without a place

    def _nothing_dropped(self) -> list[str]:
        # Transformers gives the names as it has renamed them, which need not be those in the files
        modules = {name for name, _ in self.model.named_modules()}
        dropped, elsewhere = [], []
        for name in sorted(self.report["unexpected_keys"]):
            in_model = name.rpartition(".")[0].removesuffix(".weight") in modules
            if (
                CACHE_SCALE.search(name)
                or BUFFERS.search(name)
                or (not in_model and beside_the_model(name, self.model.config))
            ):
                elsewhere.append(name)
            elif ACTIVATION.search(name) and not in_model:
                continue  # of experts, which Transformers joins and decodes: a note says so (activations.py)
            elif SIDE.search(name) or (in_model and self._changes_scores(name)):
                dropped.append(name)
            else:
                elsewhere.append(name)
        if dropped:
            raise self._error(
                f"Transformers {transformers.__version__} has no use for {some(dropped)}, without which the weights "
                "mean something else",
                _OTHER_WAYS,
            )
        if elsewhere:
            return [f"{len(elsewhere)} tensors have no place in Transformers' model: {some(elsewhere)}"]
        return []

    def _changes_scores(self, name: str) -> bool:
        """Whether a tensor of a module that the model has is a weight or bias of floats other than zeros."""
        if name.rpartition(".")[2] not in ("weight", "bias"):
            return False
        stored = (self.tensors or {}).get(name)
        if stored is None:
            return True
        if stored.dtype not in FLOATS:
            return stored.dtype != "BOOL" and len(stored.shape) < 3  # a causal mask has more dimensions
        with safe_open(stored.path, framework="pt") as file:  # old GPTQ checkpoints have a bias of zeros everywhere
            return bool(torch.count_nonzero(file.get_tensor(name)))

    # ------------------------------------------------------------------ shapes

    def _shapes_agree(self) -> None:
        if self.running in RESHAPING:
            return
        for name, (given, expected) in sorted(self.landing.other_shapes(self.model).items()):
            raise self._error(
                f"{name} is stored as {list(given)}, but by config.json it is {list(expected)}",
                "config.json belongs to another checkpoint",
            )

    # ------------------------------------------------------------------ activations

    def decoded_modules(self) -> list[str]:
        """Modules whose stored codes Transformers has decoded into a dense weight."""
        if self.tensors is None or self.stored is None:
            return []
        return sorted(set(payloads(self.tensors, self.stored)))
