"""`exllamav3`: EXL3 checkpoints, and unquantized ones in float16, on ExLlamaV3. Tried with exllamav3 1.6.5.

Uses parts of the engine that are not public: `Model.fwd_modules` (the modules that `Model.forward` runs: without the
last one, it returns hidden states), `Cache.layers` (their pages are copied if a context has several continuations) and
the embedding module's `embedding` and `device` (moved to the first layer's device while windows are scored).
"""

from __future__ import annotations

from typing import Any

from lmeval_ext.models.exllama.loading import require
from lmeval_ext.models.exllama.messages import import_error
from lmeval_ext.models.exllama.v3.loading import PACKAGE

try:  # before all modules that import the engine
    require(PACKAGE)
    from exllamav3 import Model, Tokenizer

    from lmeval_ext.models.exllama.v3.engine import ExLlamaV3Engine
    from lmeval_ext.models.exllama.v3.generation import ExLlamaV3Generator
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, PACKAGE) from error

import torch

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
from lmeval_ext.models.exllama.v3.loading import CACHE_BITS, cache_bytes, model_config, new_cache, version
from lmeval_ext.models.exllama.v3.processes import end_at_exit
from lmeval_ext.models.record import Quantization


class ExLlamaV3(ExLlamaLM):
    """EXL3 checkpoints, and unquantized ones in float16.

    Takes the arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the
    other), tensor_parallel, tp_backend (native or nccl), cache_tokens (KV cache of all generations together; 0: none),
    cache_bits (2 to 8, keys and values apart: 8/4; default fp16), max_jobs (generations at a time), embedding_on_gpu
    (default: if they are small), override_tensors (YAML files as for ExLlamaV3's -or), swa_full.
    """

    engine_name = PACKAGE.name
    engine_packages = ("exllamav3",)
    engine: ExLlamaV3Engine

    def load(
        self,
        device: str | None = None,
        gpu_split: Any = None,
        tensor_parallel: bool = False,
        tp_backend: str = "native",
        cache_tokens: int | None = None,
        cache_bits: Any = None,
        max_jobs: int = 64,
        embedding_on_gpu: bool | None = None,
        override_tensors: Any = None,
        swa_full: bool = False,
        **unknown: Any,
    ) -> Engine:
        check_unknown(PACKAGE, unknown)
        self.engine_version = version()
        self._max_jobs = int(max_jobs)
        self._generator: ExLlamaV3Generator | None = None
        self.cache_bits = parse_cache_bits(cache_bits, CACHE_BITS)
        self.windowed_cache = not swa_full
        split = numbers("gpu_split", gpu_split)
        index = single_device(device, split, bool(tensor_parallel))
        check_gpu(PACKAGE, index)
        try:
            config = model_config(self.folder, override_tensors)
            model = Model.from_config(config, swa_full=True) if swa_full else Model.from_config(config)
            tokens = cache_size(self.folder, cache_tokens, self.max_length, self.length_is_given)
            cache = new_cache(model, tokens, self.cache_bits)
            before = allocated_bytes()
            if index is not None:
                model.load(device=torch.device("cuda", index), progressbar=False)
            else:
                if tensor_parallel:
                    end_at_exit(model)
                model.load(
                    use_per_device=split,
                    tensor_p=bool(tensor_parallel),
                    tp_backend=tp_backend,
                    max_chunk_size=2048,
                    progressbar=False,
                )
            engine = ExLlamaV3Engine(model, cache, text_config(self.config), embedding_on_gpu)
            try_forward(engine)
        except Exception as error:
            raise load_error(error, PACKAGE, self.folder, self.config) from error
        self._kv_bytes = cache_bytes(cache)
        self._weights_bytes = None if tensor_parallel else allocated_bytes() - before - self._kv_bytes
        reset_peak_memory()
        return engine

    def generator(self) -> JobGenerator:
        engine = self.engine
        if engine.cache is None:
            raise no_cache()
        if self._generator is None or engine.cache_is_dirty:
            # Only a new generator forgets which prompts the pages held
            if self._generator is not None:
                self._generator.close()
            tokenizer = Tokenizer.from_config(engine.model.config)
            self._generator = ExLlamaV3Generator(engine.model, engine.cache, tokenizer, self._max_jobs)
            engine.cache_is_dirty = False
            if engine.branches is not None:
                engine.branches.forget()
        return self._generator

    def describe_engine(self, facts: Quantization) -> Quantization:
        kinds = sorted({str(m.quant_type) for m in self.engine.model if getattr(m, "quant_type", None)})
        facts.kernel = "+".join(kinds) or ("exl3" if facts.family == "EXL3" else None)
        if self.engine.tensor_parallel:
            facts.notes.append("peak_vram_gb unknown: under tensor parallel the weights are in other processes")
            return facts
        describe_embedding(facts, self.engine.embedding_bytes)
        return describe_memory(facts, self._kv_bytes, self._weights_bytes)
