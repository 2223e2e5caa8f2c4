"""`exllamav3`: EXL3 checkpoints, and unquantized ones in float16, on ExLlamaV3. Tried with exllamav3 1.6.5.

Not public in the engine, and used here: `Model.fwd_modules` (what `Model.forward` walks through: without its last
module, hidden states come out), `Cache.layers` (their pages are copied where a context has several continuations) and
the embedding module's `embedding` and `device` (moved beside the first layer while windows are scored).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.base import Quantization
from lmeval_ext.models.exllama_messages import (
    check_gpu,
    check_unknown,
    import_error,
    load_error,
    require,
    single_device,
)

try:
    require("exllamav3", "exl3")
    import exllamav3
    from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant, Config, Job, Model, Tokenizer
    from exllamav3.generator.sampler import ArgmaxSampler, ComboSampler
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, "exllamav3", "exl3") from error
import torch

from lmeval_ext.models.exllama_batching import Engine
from lmeval_ext.models.exllama_common import (
    ExLlamaLM,
    activation_bytes,
    allocated_bytes,
    default_cache_tokens,
    gpu_embedding,
    measured_memory,
    quantized_cache,
    reset_peak_memory,
)
from lmeval_ext.models.exllama_config import cache_bits as parse_bits
from lmeval_ext.models.exllama_config import numbers, text_config
from lmeval_ext.models.exllama_generation import Generator, Prompt
from lmeval_ext.models.exllamav3_branches import Branches
from lmeval_ext.models.exllamav3_processes import end_at_exit
from lmeval_ext.storage.kv_cache import kv_cache

logger = logging.getLogger(__name__)

PAGE = 256  # exllamav3.constants.PAGE_SIZE


class ExLlamaV3Engine:
    """A loaded model, its cache, and its forward in two parts: body and output matrix. See `Engine`."""

    def __init__(self, model: Any, cache: Any, config: dict[str, Any], embedding_on_gpu: bool | None = None) -> None:
        self.model, self.cache = model, cache
        self.device = torch.device(model.output_device)
        self.vocabulary = int(model.config.vocab_size)
        self.tensor_parallel = bool(model.loaded_tp)
        self._whole = list(model.fwd_modules)
        self._head = next(m for m in model.modules if m.caps.get("logits_output"))
        self.columns = int(getattr(self._head, "out_features", 0) or self.vocabulary)
        self.token_limit: int | None = None
        self.bytes_per_token = activation_bytes(config) + (2 * self.columns if self.tensor_parallel else 0)
        # Main memory is where ExLlamaV3 keeps them; uploading float32 states is 30 % of a small model's time
        self._embedding = (
            None if self.tensor_parallel else gpu_embedding(model.modules[0], model.modules[1].device, embedding_on_gpu)
        )
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        exact = cache is not None and all(type(layer) is CacheLayer_fp16 for layer in cache.layers.values())
        recurrent = bool(model.caps.get("recurrent_states")) or bool(model.get_recurrent_layers())
        self.shares = exact and not recurrent and not self.tensor_parallel and bool(cache.layers)
        self.branches = Branches(self, PAGE) if self.shares else None
        self.cache_is_dirty = False  # scoring wrote into pages that a generator may take for its own

    def enter(self) -> None:
        """ExLlamaV3 computes on whatever stream is current."""

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The model without its output matrix, with its embeddings on the GPU."""
        first = self.model.modules[0]
        kept = getattr(first, "embedding", None), first.device
        self.model.fwd_modules = self._whole[: self._body_length()]
        if self._embedding is not None:
            first.embedding, first.device = self._embedding, self._embedding.weight.device
        try:
            yield
        finally:
            self.model.fwd_modules = self._whole
            if self._embedding is not None:
                first.embedding, first.device = kept

    def _body_length(self) -> int:
        if self._whole[-1][0] is not self._head:
            raise UserError(
                f"{type(self.model).__name__}: its output matrix is not its last module; this ExLlamaV3 "
                f"({exllamav3.__name__} {version()}) is newer than the adapter, tried with 1.6.5"
            )
        return len(self._whole) - 1

    def body(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Hidden states after the last norm, [rows, length, width]."""
        with self._scoring():
            if self._embedding is not None:
                ids = ids.to(self._embedding.weight.device, non_blocking=True)
            return self.model.forward(ids, params)

    def prefill(self, ids: torch.Tensor, params: dict[str, Any]) -> None:
        """Keys and values of a prompt, and nothing else."""
        with self._scoring():
            self.model.prefill(ids, params)

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        params: dict[str, Any] = {"attn_mode": "flash_attn_nc"}
        if self.tensor_parallel:  # its processes return logits only
            return self.model.forward(ids, {**params, "last_tokens_only": keep})
        return self.body(ids, params)[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel:
            return hidden
        # The kernels read plain rows
        return self._head.forward(self._head.prepare_for_device(hidden.contiguous(), {}), {})

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        return self.branches is not None and self.branches.fit(contexts, tails)

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        assert self.branches is not None
        self.cache_is_dirty = True
        return self.branches.run(contexts, tails)


class ExLlamaV3Generator:
    """ExLlamaV3's dynamic generator: paged cache, continuous batching, prompts that share pages computed once."""

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int) -> None:
        self.cache_tokens = int(cache.max_num_tokens)
        # No cooldown: nobody waits for the first words of an answer here, and prompts are computed as they come
        self._generator = exllamav3.Generator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs,
            max_chunk_size=2048,
            shared_chunk_size=2048,
            prefill_cooldown=0,
        )

    def submit(self, prompt: Prompt) -> None:
        self._generator.enqueue(
            Job(
                input_ids=torch.tensor([prompt.ids], dtype=torch.long),
                max_new_tokens=prompt.max_new,
                sampler=sampler(prompt),
                seed=prompt.seed,
                stop_conditions=[*prompt.stop_tokens, *prompt.stop_strings],
                identifier=prompt.index,
            )
        )

    def step(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def clear(self) -> None:
        self._generator.clear_queue()

    def close(self) -> None:
        self._generator.close()


def sampler(prompt: Prompt) -> Any:
    """Temperature first, then min-p, top-k and top-p, as Transformers orders them."""
    s = prompt.sampling
    penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    if s.temperature == 0.0 and penalties == (1.0, 0.0, 0.0):
        return ArgmaxSampler()
    return ComboSampler(
        rep_p=s.repetition_penalty,
        pres_p=s.presence_penalty,
        freq_p=s.frequency_penalty,
        temperature=s.temperature,
        min_p=s.min_p,
        top_k=s.top_k,
        top_p=s.top_p,
    )


class ExLlamaV3(ExLlamaLM):
    """EXL3 checkpoints, and unquantized ones in float16.

    Arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the other),
    tensor_parallel, tp_backend (native or nccl), cache_tokens (KV cache over all generations; 0: none), cache_bits (2
    to 8, keys/values apart: 8/4; default fp16), max_jobs (generations at a time), embedding_on_gpu (default: if they
    are small), override_tensors (YAML files of ExLlamaV3's -or), swa_full.
    """

    engine_name = "exllamav3"
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


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("exllamav3")
    except metadata.PackageNotFoundError:
        return str(getattr(exllamav3, "__version__", "unknown"))


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
