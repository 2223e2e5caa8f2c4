"""`exllamav2`: EXL2 and GPTQ checkpoints, and unquantized ones in float16, on ExLlamaV2. Tried with exllamav2 0.3.2.

Not public in the engine, and used here: `ExLlamaV2.modules` is walked as in `ExLlamaV2.forward_chunk`, without the
output matrix, which then runs on the scored positions only. Two of its traps are closed: the base of rotary embeddings
in configs of Transformers 5 (exllama_config.py), and a causal mask that 0.3.2 loses where neither flash-attn nor
xformers attends (`causal_attention`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.messages import (
    check_gpu,
    check_unknown,
    import_error,
    load_error,
    require,
    single_device,
)
from lmeval_ext.models.exllama.v2.attention import repair_attention
from lmeval_ext.models.exllama.v2.engine import ExLlamaV2Engine, ExLlamaV2Generator, cache_bytes
from lmeval_ext.models.record import Quantization

try:
    require("exllamav2", "exl2")
    import exllamav2
    from exllamav2 import (
        ExLlamaV2,
        ExLlamaV2Cache,
        ExLlamaV2Cache_Q4,
        ExLlamaV2Cache_Q6,
        ExLlamaV2Cache_Q8,
        ExLlamaV2Config,
        ExLlamaV2Tokenizer,
    )
    from exllamav2 import attn as v2_attention
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, "exllamav2", "exl2") from error
import torch

from lmeval_ext.models.exllama.adapter import ExLlamaLM
from lmeval_ext.models.exllama.config import cache_bits as parse_bits
from lmeval_ext.models.exllama.config import numbers, text_config
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.generation import Generator
from lmeval_ext.models.exllama.memory import (
    allocated_bytes,
    default_cache_tokens,
    measured_memory,
    quantized_cache,
    reset_peak_memory,
)
from lmeval_ext.models.exllama.v2.rope import tell_v2_rope
from lmeval_ext.storage.kv_cache import kv_cache

logger = logging.getLogger(__name__)

_INPUT = 2048  # config.max_input_len: tokens of one row in one forward of the generator
_ROWS = 16384  # tokens of one forward; the engine allocates its buffers for them while loading
_LENGTH = _ROWS - 32  # max_length where none is asked for, at most: padded, it still fits into them
_CACHES = {4: ExLlamaV2Cache_Q4, 6: ExLlamaV2Cache_Q6, 8: ExLlamaV2Cache_Q8}


class ExLlamaV2Model(ExLlamaLM):
    """EXL2 and GPTQ checkpoints, and unquantized ones in float16.

    Arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the other),
    cache_tokens (KV cache over all generations; 0: none), cache_bits (4, 6, 8; default fp16), max_jobs (generations at
    a time; one where flash-attn is missing), embedding_on_gpu (default: if they are small). max_length defaults to
    16352 where the model's own is longer.
    """

    engine_name = "exllamav2"
    engine_packages = ("exllamav2",)
    engine: ExLlamaV2Engine

    def load(
        self,
        device: str | None = None,
        gpu_split: Any = None,
        tensor_parallel: bool = False,
        cache_tokens: int | None = None,
        cache_bits: Any = None,
        max_jobs: int = 64,
        embedding_on_gpu: bool | None = None,
        **unknown: Any,
    ) -> Engine:
        check_unknown(unknown, "exllamav2")
        if tensor_parallel:
            raise UserError(
                "tensor_parallel=True: ExLlamaV2's tensor-parallel mode gives no hidden states to score; use "
                "gpu_split=20/24"
            )
        self.engine_version = str(exllamav2.__version__).strip()
        self._max_jobs, self._cache = int(max_jobs), None
        self._generator: ExLlamaV2Generator | None = None
        self._bits = parse_bits(cache_bits, (4, 6, 8))
        if self._bits is not None and self._bits[0] != self._bits[1]:
            raise UserError(f"cache_bits={cache_bits!r}: ExLlamaV2 keeps keys and values in the same number of bits")
        split = numbers("gpu_split", gpu_split)
        place = single_device(device, split, False)
        if place is not None and place > 0:
            split = [0.0] * place + [99999.0]
        check_gpu("exllamav2", (6, 0), [place] if place is not None else list(range(torch.cuda.device_count())))
        try:
            config = self._configure()
            self._attention = repair_attention(config)
            self._tokens = self._cache_tokens(cache_tokens)
            before = allocated_bytes()
            model = ExLlamaV2(config)
            if place is None and split is None and self._tokens:
                self._cache = self._new_cache(model, lazy=True)
                model.load_autosplit(self._cache)
            else:
                model.load(split)
            engine = ExLlamaV2Engine(model, text_config(self.config), embedding_on_gpu=embedding_on_gpu)
            with torch.inference_mode():  # what does not run is found now, and not at the first request
                engine.logits(engine.hidden(torch.zeros((1, 32), dtype=torch.int64), 1)[0]).sum().item()
        except Exception as error:
            raise load_error(error, "exllamav2", self.folder, self.config, multiple=32) from error
        pool = 0 if self._cache is None else cache_bytes(self._cache)
        self._weights = allocated_bytes() - before - pool
        reset_peak_memory()
        return engine

    def _configure(self) -> Any:
        config = ExLlamaV2Config()
        config.model_dir = str(self.folder)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # it says here, and nowhere else, that it takes the model for a Llama
            config.prepare()
        if "unknown architecture" in said.getvalue():
            names = ", ".join(self.config["architectures"])
            raise UserError(
                f"{self.folder}: ExLlamaV2 {self.engine_version} does not know {names}, "
                "and would run it as a Llama; use the EXL3 version of this model"
            )
        config.arch_compat_overrides(quiet=True)
        tell_v2_rope(config, self.config, str(self.folder))
        self._set_lengths(config)
        return config

    def _set_lengths(self, config: Any) -> None:
        """max_length, and from it the sizes for which the engine allocates and reserves memory while loading."""
        if not self.asked_length:
            own = min(self.max_length, config.max_seq_len)
            self._max_length = min(own, _LENGTH)
            if own > _LENGTH:
                logger.warning(
                    "max_length=%d of this model's %d: ExLlamaV2's buffers grow with it; max_length=%d takes all",
                    _LENGTH,
                    own,
                    own,
                )
        # Whole pages: the generator's prompts go in such pieces, and padded rows must not leave the table of angles
        room = -(-self.max_length // 256) * 256
        if self.max_length > config.max_seq_len:
            config.max_seq_len = room
        elif config.alt_rope_method != "su":  # whose scaling depends on it
            config.max_seq_len = min(config.max_seq_len, room)
        config.max_input_len = min(_INPUT, config.max_seq_len)
        explicit = int(self.batch_size) if str(self.batch_size).isdigit() else 1
        rows = max(_ROWS, self.max_length + 32, explicit * min(self.max_length, _INPUT))
        config.max_batch_size = -(-rows // config.max_input_len)

    def _cache_tokens(self, asked: int | None) -> int:
        if asked is None:
            total = torch.cuda.get_device_properties(0).total_memory
            each = kv_cache(self.folder, "float16", "float16").bytes_per_token
            asked = default_cache_tokens(total, each, self.max_length, self.asked_length)
        return -(-int(asked) // 256) * 256

    def _new_cache(self, model: Any, lazy: bool) -> Any:
        kind = ExLlamaV2Cache if self._bits is None else _CACHES[self._bits[0]]
        return kind(model, batch_size=1, max_seq_len=self._tokens, lazy=lazy)

    def generator(self) -> Generator:
        if not self._tokens:
            raise UserError("cache_tokens=0 leaves no KV cache to generate with; set it to 8192 or more")
        if self._generator is None:
            paged = bool(v2_attention.has_flash_attn_with_paged) and not self.engine.model.config.no_flash_attn
            if not paged:
                logger.warning("flash-attn 2.5.7 is not installed: ExLlamaV2 generates for one prompt after the other")
            try:
                if self._cache is None:
                    self._cache = self._new_cache(self.engine.model, lazy=False)
            except Exception as error:
                raise load_error(error, "exllamav2", self.folder) from error
            tokenizer = ExLlamaV2Tokenizer(self.engine.model.config)
            self._generator = ExLlamaV2Generator(self.engine.model, self._cache, tokenizer, self._max_jobs, paged)
        return self._generator

    def facts(self, facts: Quantization) -> Quantization:
        quantized = self.engine.model.is_quant()
        facts.kernel = (facts.family or "exl2").lower() if quantized else "fp16"
        facts.notes.append(f"attention: {self._attention}")
        if self.engine.embedding_bytes:
            facts.notes.append(
                f"token embeddings ({self.engine.embedding_bytes / 1024**2:.0f} MiB) were copied to the GPU for scoring"
            )
        quantized_cache(facts, self._bits)
        pool = 0 if self._cache is None else cache_bytes(self._cache)
        return measured_memory(facts, pool + self.engine.scoring_cache_bytes(), self._weights)
