"""The llama.cpp context for a sequence of a given length: with LongRoPE, its size decides what a model computes.

LongRoPE models (Phi-3 and -4-mini, MiniCPM) have two sets of rotary factors: one for sequences within the original
context, one for longer ones. Transformers chooses by the length of the sequence (modeling_rope_utils.py,
`longrope_frequency_update`). llama.cpp chooses by the size of the context that was allocated (`get_rope_factors` in
llama-model.cpp), so a short sequence needs a small context.
"""

from __future__ import annotations

import ctypes
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.binding import captured, llama_cpp
from lmeval_ext.models.llamacpp.loading import GGUFModel
from lmeval_ext.storage.rounding import round_up

STEP = 256  # llama.cpp rounds contexts up to multiples of this (llama-context.cpp)
_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_OWN_FACTORS = "rope_freqs.weight"  # takes precedence over both


def original_context(model: GGUFModel) -> int | None:
    """Returns the tokens up to which the short rotary factors of a LongRoPE model hold; None for other models."""
    names = {name.rsplit(".", 2)[-2] + ".weight" for name in model.tensors if name.count(".") >= 1}
    if not names.intersection(_FACTORS) or _OWN_FACTORS in names:
        return None
    return model.integer("rope.scaling.original_context_length") or model.trained_context


class Contexts:
    """Sets the context of a `llama_cpp.Llama` to one that suits a sequence's length.

    original: as from `original_context`. size: tokens of the context with which the model was loaded.
    """

    def __init__(self, llama: Any, size: int, original: int | None) -> None:
        self._llama, self._size, self._original = llama, size, original
        self._loaded = llama._ctx  # llama-cpp-python 0.3.36: the object behind `Llama.ctx`, which generation uses
        self._short: Any = None

    def select(self, tokens: int) -> bool:
        """Selects the context for a sequence of `tokens`; returns whether it is another one than before.

        Another one holds no keys and values. Raises UserError if no context suits the sequence.
        """
        context = self._context(tokens)
        if context is self._llama._ctx:
            return False
        self._llama.reset()
        self._llama._ctx = context
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        return True

    @property
    def selected_size(self) -> int:
        """Tokens that fit into the selected context."""
        return self._size if self._llama._ctx is self._loaded else self._short_size

    @property
    def _short_size(self) -> int:
        assert self._original is not None
        return self._original // STEP * STEP

    def is_long(self, tokens: int) -> bool:
        """Whether a sequence takes the context that was loaded, which is the larger one if there are two."""
        original = self._original
        return original is None or tokens > original or round_up(self._size, STEP) <= original

    def _context(self, tokens: int) -> Any:
        if self.is_long(tokens):
            return self._loaded
        original = self._original
        if tokens > self._short_size:
            raise UserError(
                f"a sequence of {tokens} tokens is within the original context of {original}, but llama.cpp allocates "
                f"contexts in steps of {STEP} and computes with the rotary factors of longer ones; score at most "
                f"{self._short_size} tokens, or more than {original}"
            )
        if self._short is None:
            self._short = self._open(self._short_size)
        return self._short

    def _open(self, size: int) -> Any:
        """Opens another context of the same model and settings, of `size` tokens."""
        llama, given = self._llama, self._llama.context_params
        params = type(given).from_buffer_copy(given)
        params.n_ctx, params.n_batch = size, min(given.n_batch, size)
        params.n_ubatch = min(given.n_ubatch, params.n_batch)
        with captured(llama.verbose) as messages:
            try:
                context = type(self._loaded)(model=self._loaded.model, params=params, verbose=llama.verbose)
            except ValueError as error:
                reason = "; ".join(messages.errors()) or str(error)
                raise UserError(
                    f"llama.cpp could not allocate a context of {size} tokens: {reason}; lower max_length"
                ) from error
        adapter = llama._lora_adapter  # llama-cpp-python 0.3.36: sets adapters on its own context alone
        if adapter is not None:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            scales = (ctypes.c_float * 1)(llama.lora_scale)
            if llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, scales):
                raise UserError(f"lora_path={llama.lora_path!r} could not be applied to a second context")
        return context
