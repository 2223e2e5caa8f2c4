"""`exllamav2`: EXL2 and GPTQ checkpoints, and unquantized ones in float16, on ExLlamaV2. Tried with exllamav2 0.3.2.

Uses a part of the engine that is not public: `ExLlamaV2.modules` is walked as in `ExLlamaV2.forward_chunk`, without the
output matrix, which then runs on the scored positions only. Closes two of the engine's traps: the base of rotary
embeddings in configs of Transformers 5 (rope.py), and a causal mask that 0.3.2 loses where neither flash-attn nor
xformers attends (attention.py).
"""

from __future__ import annotations

import logging
from typing import Any

from lmeval_ext.models.exllama.loading import require
from lmeval_ext.models.exllama.messages import import_error
from lmeval_ext.models.exllama.v2.loading import PACKAGE

try:  # before all modules that import the engine
    require(PACKAGE)
    import exllamav2
    from exllamav2 import ExLlamaV2, ExLlamaV2Tokenizer
    from exllamav2 import attn as v2_attention

    from lmeval_ext.models.exllama.v2.attention import repair_attention
    from lmeval_ext.models.exllama.v2.engine import ExLlamaV2Engine
    from lmeval_ext.models.exllama.v2.generation import ExLlamaV2Generator
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, PACKAGE) from error

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.adapter import ExLlamaLM
from lmeval_ext.models.exllama.config import text_config
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.generation import JobGenerator
from lmeval_ext.models.exllama.loading import (
    check_gpu,
    check_unknown,
    numbers,
    parse_cache_bits,
    single_device,
    try_forward,
)
from lmeval_ext.models.exllama.memory import (
    allocated_bytes,
    cache_size,
    describe_embedding,
    describe_memory,
    reset_peak_memory,
)
from lmeval_ext.models.exllama.messages import load_error, no_cache
from lmeval_ext.models.exllama.v2.loading import CACHE_BITS, cache_bytes, model_config, new_cache, set_lengths
from lmeval_ext.models.record import Quantization

logger = logging.getLogger(__name__)


class ExLlamaV2Model(ExLlamaLM):
    """EXL2 and GPTQ checkpoints, and unquantized ones in float16.

    Takes the arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the
    other), cache_tokens (KV cache of all generations together; 0: none), cache_bits (4, 6, 8; default fp16), max_jobs
    (generations at a time; one without flash-attn), embedding_on_gpu (default: if they are small). max_length defaults
    to 16352 if the model's own is longer.
    """

    engine_name = PACKAGE.name
    windowed_cache = False
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
        check_unknown(PACKAGE, unknown)
        if tensor_parallel:
            raise UserError(
                "tensor_parallel=True: ExLlamaV2's tensor-parallel mode returns no hidden states to score; use "
                "gpu_split=20/24"
            )
        self.engine_version = str(exllamav2.__version__).strip()
        self._max_jobs = int(max_jobs)
        self._generator: ExLlamaV2Generator | None = None
        self.cache_bits = parse_cache_bits(cache_bits, CACHE_BITS)
        if self.cache_bits is not None and self.cache_bits[0] != self.cache_bits[1]:
            raise UserError(f"cache_bits={cache_bits!r}: ExLlamaV2 keeps keys and values in the same number of bits")
        split = numbers("gpu_split", gpu_split)
        index = single_device(device, split, False)
        if index is not None and index > 0:
            split = [0.0] * index + [99999.0]
        check_gpu(PACKAGE, index)
        try:
            config = model_config(self.folder, self.config, self.engine_version)
            self._max_length = set_lengths(config, self.max_length, self.length_is_given, self.batch_size)
            self._attention = repair_attention(config)
            self._cache_tokens = cache_size(self.folder, cache_tokens, self.max_length, self.length_is_given)
            before = allocated_bytes()
            model = ExLlamaV2(config)
            self._cache: Any = None
            if index is None and split is None and self._cache_tokens:
                self._cache = new_cache(model, self._cache_tokens, self.cache_bits, lazy=True)
                model.load_autosplit(self._cache)
            else:
                model.load(split)
            engine = ExLlamaV2Engine(model, text_config(self.config), embedding_on_gpu)
            try_forward(engine)
        except Exception as error:
            raise load_error(error, PACKAGE, self.folder, self.config) from error
        self._weights_bytes = allocated_bytes() - before - cache_bytes(self._cache)
        reset_peak_memory()
        return engine

    def generator(self) -> JobGenerator:
        if not self._cache_tokens:
            raise no_cache()
        if self._generator is None:
            model = self.engine.model
            paged = bool(v2_attention.has_flash_attn_with_paged) and not model.config.no_flash_attn
            if not paged:
                logger.warning("flash-attn 2.5.7 is not installed: ExLlamaV2 generates for one prompt after the other")
            try:
                if self._cache is None:
                    self._cache = new_cache(model, self._cache_tokens, self.cache_bits)
            except Exception as error:
                raise load_error(error, PACKAGE, self.folder) from error
            tokenizer = ExLlamaV2Tokenizer(model.config)
            self._generator = ExLlamaV2Generator(model, self._cache, tokenizer, self._max_jobs, paged)
        return self._generator

    def describe_engine(self, facts: Quantization) -> Quantization:
        quantized = self.engine.model.is_quant()
        facts.kernel = (facts.family or "exl2").lower() if quantized else "fp16"
        facts.notes.append(f"attention: {self._attention}")
        describe_embedding(facts, self.engine.embedding_bytes)
        kv_bytes = cache_bytes(self._cache) + self.engine.branches.cache_bytes
        return describe_memory(facts, kv_bytes, self._weights_bytes)
