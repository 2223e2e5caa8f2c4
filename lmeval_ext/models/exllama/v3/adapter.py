"""`exllamav3`: EXL3 checkpoints, and unquantized ones in float16, on ExLlamaV3. Tried with exllamav3 1.6.5.

Not public in the engine, and used here: `Model.fwd_modules` (what `Model.forward` walks through: without its last
module, hidden states come out), `Cache.layers` (their pages are copied where a context has several continuations) and
the embedding module's `embedding` and `device` (moved beside the first layer while windows are scored).
"""

from __future__ import annotations

import logging
from pathlib import Path
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
from lmeval_ext.models.exllama.v3.engine import PAGE, ExLlamaV3Engine, ExLlamaV3Generator, version
from lmeval_ext.models.record import Quantization

try:
    require("exllamav3", "exl3")
    from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant, Config, Model, Tokenizer
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, "exllamav3", "exl3") from error
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
from lmeval_ext.models.exllama.v3.processes import end_at_exit
from lmeval_ext.storage.kv_cache import kv_cache

logger = logging.getLogger(__name__)


class ExLlamaV3(ExLlamaLM):
    """EXL3 checkpoints, and unquantized ones in float16.

    Arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the other),
    tensor_parallel, tp_backend (native or nccl), cache_tokens (KV cache over all generations; 0: none), cache_bits (2
    to 8, keys/values apart: 8/4; default fp16), max_jobs (generations at a time), embedding_on_gpu (default: if they
    are small), override_tensors (YAML files of ExLlamaV3's -or), swa_full.
    """

    engine_name = "exllamav3"
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
        check_unknown(unknown, "exllamav3")
        self.engine_version = version()
        self._max_jobs = int(max_jobs)
        self._generator: ExLlamaV3Generator | None = None
        self._bits = parse_bits(cache_bits, tuple(range(2, 9)))
        split = numbers("gpu_split", gpu_split)
        place = single_device(device, split, bool(tensor_parallel))
        check_gpu("exllamav3", (7, 5), [place] if place is not None else list(range(torch.cuda.device_count())))
        try:
            config = Config.from_directory(str(self.folder))
            override(config, override_tensors)
            model = Model.from_config(config, swa_full=bool(swa_full)) if swa_full else Model.from_config(config)
            cache = self._cache(model, cache_tokens)
            before = allocated_bytes()
            if place is not None:
                model.load(device=torch.device("cuda", place), progressbar=False)
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
            with torch.inference_mode():  # what does not run is found now, and not at the first request
                engine.logits(engine.hidden(torch.zeros((1, 32), dtype=torch.int64), 1)[0]).sum().item()
        except Exception as error:
            raise load_error(error, "exllamav3", self.folder, self.config, multiple=128) from error
        self._kv_bytes = 0 if cache is None else sum(int(layer.storage_size()) for layer in cache.layers.values())
        self._weights = None if tensor_parallel else allocated_bytes() - before - self._kv_bytes
        reset_peak_memory()
        return engine

    def _cache(self, model: Any, tokens: int | None) -> Any:
        """The KV cache. It must stand before the model is loaded, which allocates it layer by layer."""
        if tokens is None:
            total = torch.cuda.get_device_properties(0).total_memory
            each = kv_cache(self.folder, "float16", "float16").bytes_per_token
            tokens = default_cache_tokens(total, each, self.max_length, self.asked_length)
        tokens = -(-int(tokens) // PAGE) * PAGE
        if tokens == 0:
            return None
        if self._bits is None:
            return Cache(model, max_num_tokens=tokens, layer_type=CacheLayer_fp16)
        keys, values = self._bits
        return Cache(model, max_num_tokens=tokens, layer_type=CacheLayer_quant, k_bits=keys, v_bits=values)

    def generator(self) -> Generator:
        if self.engine.cache is None:
            raise UserError("cache_tokens=0 leaves no KV cache to generate with; set it to 8192 or more")
        if self._generator is None or self.engine.cache_is_dirty:
            # A new one forgets what it takes the pages to hold
            if self._generator is not None:
                self._generator.close()
            tokenizer = Tokenizer.from_config(self.engine.model.config)
            self._generator = ExLlamaV3Generator(self.engine.model, self.engine.cache, tokenizer, self._max_jobs)
            self.engine.cache_is_dirty = False
            if self.engine.branches is not None:
                self.engine.branches.forget()
        return self._generator

    def facts(self, facts: Quantization) -> Quantization:
        kinds = sorted({str(m.quant_type) for m in self.engine.model if getattr(m, "quant_type", None)})
        facts.kernel = "+".join(kinds) or ("exl3" if facts.family == "EXL3" else None)
        quantized_cache(facts, self._bits)
        if self.engine.tensor_parallel:
            facts.notes.append("peak_vram_gb unknown: under tensor parallel the weights are in other processes")
            return facts
        if self.engine.embedding_bytes:
            facts.notes.append(
                f"token embeddings ({self.engine.embedding_bytes / 1024**2:.0f} MiB) were copied to the GPU for scoring"
            )
        return measured_memory(facts, self._kv_bytes, self._weights)


def override(config: Any, files: Any) -> None:
    """Take tensors from other checkpoints, as ExLlamaV3's `-or FILE.yaml` does: sources (id, model_dir), overrides
    (key, source)."""
    if not files:
        return
    import yaml
    from exllamav3.loader import SafetensorsCollection, VariantSafetensorsCollection

    variants = VariantSafetensorsCollection(config.stc)
    for file in files if isinstance(files, list | tuple) else [files]:
        try:
            wanted = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            sources = {source["id"]: source["model_dir"] for source in wanted["sources"]}
            rows = [(row["key"], sources[row["source"]]) for row in wanted["overrides"]]
        except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(
                f"override_tensors={file!r} cannot be read ({type(error).__name__}: {error}); expected YAML with "
                "sources (id, model_dir) and overrides (key, source)"
            ) from error
        for folder in dict.fromkeys(folder for _, folder in rows):
            variants.add_stc([key for key, source in rows if source == folder], SafetensorsCollection(folder))
    config.stc = variants
