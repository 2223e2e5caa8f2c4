"""An ExLlamaV2 configuration and cache for a checkpoint: rotary embeddings, lengths, buffer sizes.

Imports the engine only inside functions, once its adapter has checked that it works.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.loading import Package
from lmeval_ext.models.exllama.memory import BLOCK, PAGE
from lmeval_ext.models.exllama.v2.rope import set_rope
from lmeval_ext.storage.rounding import ceil_div, round_up

logger = logging.getLogger(__name__)

PACKAGE = Package("exllamav2", extra="exl2", compute_capability=(6, 0), width_multiple=32)
CACHE_BITS = (4, 6, 8)

MAX_INPUT = 2048  # config.max_input_len: tokens of one row in one forward of the generator
FORWARD_TOKENS = 16384  # tokens of one forward; the engine allocates its buffers for them while loading
DEFAULT_LENGTH = FORWARD_TOKENS - BLOCK  # the longest default max_length: padded, it still fits into a forward


def model_config(folder: Path, config: dict[str, Any], version: str) -> Any:
    """Returns the `ExLlamaV2Config` of a checkpoint, with its rotary embeddings set. config: its config.json.

    Raises UserError for an architecture that the engine does not know.
    """
    from exllamav2 import ExLlamaV2Config

    v2 = ExLlamaV2Config()
    v2.model_dir = str(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # the only place where it reports that it takes the model for a Llama
        v2.prepare()
    if "unknown architecture" in printed.getvalue():
        names = ", ".join(config["architectures"])
        raise UserError(
            f"{folder}: ExLlamaV2 {version} does not know {names}, and would run it as a Llama; use the EXL3 version "
            "of this model"
        )
    v2.arch_compat_overrides(quiet=True)
    set_rope(v2, config, str(folder))
    return v2


def set_lengths(v2: Any, max_length: int, length_is_given: bool, batch_size: int | str) -> int:
    """Sets the sizes for which the engine allocates and reserves memory while loading; returns max_length.

    v2: an `ExLlamaV2Config`. max_length: the user's if length_is_given, else the model's own, which may be lowered.
    batch_size: the argument of that name.
    """
    if not length_is_given:
        own = min(max_length, v2.max_seq_len)
        max_length = min(own, DEFAULT_LENGTH)
        if own > DEFAULT_LENGTH:
            logger.warning(
                "max_length=%d of this model's %d: ExLlamaV2's buffers grow with it; max_length=%d takes all",
                DEFAULT_LENGTH,
                own,
                own,
            )
    # Whole pages: the generator feeds prompts in such pieces, and padded rows must stay within the table of angles
    room = round_up(max_length, PAGE)
    if max_length > v2.max_seq_len:
        v2.max_seq_len = room
    elif v2.alt_rope_method != "su":  # whose scaling depends on it
        v2.max_seq_len = min(v2.max_seq_len, room)
    v2.max_input_len = min(MAX_INPUT, v2.max_seq_len)
    rows = int(batch_size) if str(batch_size).isdigit() else 1
    tokens = max(FORWARD_TOKENS, max_length + BLOCK, rows * min(max_length, MAX_INPUT))
    v2.max_batch_size = ceil_div(tokens, v2.max_input_len)
    return max_length


def new_cache(model: Any, tokens: int, bits: tuple[int, int] | None, lazy: bool = False) -> Any:
    """Returns the KV cache of the generator. bits: None: float16. lazy: its tensors are allocated with the model's."""
    from exllamav2 import ExLlamaV2Cache, ExLlamaV2Cache_Q4, ExLlamaV2Cache_Q6, ExLlamaV2Cache_Q8

    classes = {4: ExLlamaV2Cache_Q4, 6: ExLlamaV2Cache_Q6, 8: ExLlamaV2Cache_Q8}
    kind = ExLlamaV2Cache if bits is None else classes[bits[0]]
    return kind(model, batch_size=1, max_seq_len=tokens, lazy=lazy)


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of a cache's tensors; 0 for None."""
    if cache is None:
        return 0
    return sum(t.numel() * t.element_size() for t in cache.all_tensors() if t is not None)
