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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    from exllamav2.compat import safe_move_tensor
    from exllamav2.device import set_device_streams
    from exllamav2.ext import exllamav2_ext
    from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler
except Exception as error:  # a failed compilation is a RuntimeError, a missing toolkit an OSError
    raise import_error(error, "exllamav2", "exl2") from error
import torch

from lmeval_ext.models.choices import common_prefix
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
from lmeval_ext.models.exllama_config import numbers, tell_v2_rope, text_config
from lmeval_ext.models.exllama_generation import Generator, Prompt
from lmeval_ext.storage.kv_cache import kv_cache

logger = logging.getLogger(__name__)

_INPUT = 2048  # config.max_input_len: tokens of one row in one forward of the generator
_ROWS = 16384  # tokens of one forward; the engine allocates its buffers for them while loading
_LENGTH = _ROWS - 32  # max_length where none is asked for, at most: padded, it still fits into them
_CACHES = {4: ExLlamaV2Cache_Q4, 6: ExLlamaV2Cache_Q6, 8: ExLlamaV2Cache_Q8}
_original_attention = v2_attention.ExLlamaV2Attention._attn_torch


def causal_attention(
    self: Any, batch_size: int, q_len: int, q: Any, k: Any, v: Any, params: Any, cfg: Any, causal: bool = True
) -> Any:
    """In place of `ExLlamaV2Attention._attn_torch`, which in 0.3.2 passes no mask to PyTorch's attention.

    (`if … or causal: attn_mask_lr = attn_params.get_block_diag_mask(…)` is None for text: every token sees all later
    ones.) q: [batch, q_len, heads, dim]; k, v: [batch, k_len, KV heads, dim], their last q_len positions being the
    queries' own. Cases that PyTorch's attention cannot do stay with the engine's own, masked, products.
    Raises UserError where those are wrong, too: of a sliding window they keep the last keys, whichever the query.
    """
    plain = causal and params.is_causal() and not cfg.attn_logit_softcapping and not cfg.no_sdpa
    window = int(self.sliding_window or 0)
    if not plain or self.layer_idx in params.block_diag_layers:
        if window and k.shape[1] > window and q_len > 1:
            raise UserError(
                f"{k.shape[1]} tokens: without flash-attn, ExLlamaV2 0.3.2 attends wrongly beyond this model's sliding "
                f"window of {window}; lower eval_len or max_length to {window}, or install flash-attn 2.6 or newer"
            )
        return _original_attention(self, batch_size, q_len, q, k, v, params, cfg, causal)
    k_len, heads, dim = k.shape[1], q.shape[2], q.shape[3]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = self.repeat_kv(k, self.num_key_value_groups), self.repeat_kv(v, self.num_key_value_groups)
    mask, is_causal = None, q_len == k_len and q_len > 1
    if window and k_len > window:
        behind = torch.arange(k_len - q_len, k_len, device=q.device)[:, None] - torch.arange(k_len, device=q.device)
        mask, is_causal = (behind >= 0) & (behind < window), False
    elif not is_causal and q_len > 1:
        mask = v2_attention.causal_lower_right(q_len, k_len)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=self.scaling)
    return out.transpose(1, 2).reshape(batch_size, q_len, heads * dim)


def repair_attention(config: Any = None) -> str:
    """Put `causal_attention` in its place, for wherever the engine turns to PyTorch; returns what attends.

    config: an ExLlamaV2Config after `arch_compat_overrides()`, which rules out what an architecture cannot be run with.
    None: before there is one, as for the engine's converter.
    """
    v2_attention.ExLlamaV2Attention._attn_torch = causal_attention
    if v2_attention.has_flash_attn and not getattr(config, "no_flash_attn", False):
        return "flash-attn"
    if v2_attention.has_xformers and not getattr(config, "no_xformers", False):
        return "xformers"
    eager = getattr(config, "no_sdpa", False) or getattr(config, "attn_logit_softcapping", None)
    return "torch matmul" if eager else "torch SDPA"


class ExLlamaV2Engine:
    """A loaded model and its forward in two parts: body and output matrix. See `Engine`."""

    def __init__(
        self, model: Any, config: dict[str, Any], share: bool = True, embedding_on_gpu: bool | None = None
    ) -> None:
        self.model = model
        self._modules = list(model.modules)
        self._head_at = int(model.head_layer_idx)
        head = self._modules[self._head_at]
        self.device = torch.device(head.device())
        self.vocabulary = int(model.config.vocab_size)
        self.columns = int(head.out_features)
        self.token_limit: int | None = int(model.config.max_input_len * model.config.max_batch_size)
        self.bytes_per_token = activation_bytes(config)
        self.shares = share
        self._cap = model.config.final_logit_softcapping
        self._embedding = gpu_embedding(self._modules[0], self._modules[1].device(), embedding_on_gpu)
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        # Of the context that was computed last, and of the rows of its tails
        self._trunk: Any = None
        self._leaves: Any = None
        self._held: list[int] = []

    def enter(self) -> None:
        """ExLlamaV2 has a stream of its own on every GPU."""
        set_device_streams()
        torch.cuda.set_device(self.device)

    @contextmanager
    def _own_embedding(self) -> Iterator[None]:
        first = self._modules[0]
        kept = first.embedding
        if self._embedding is not None:
            first.embedding = self._embedding
        try:
            yield
        finally:
            first.embedding = kept

    def body(self, ids: torch.Tensor, cache: Any = None, past: int = 0, modules: int | None = None) -> torch.Tensor:
        """Hidden states after the last norm, [rows, length, width], as `ExLlamaV2.forward_chunk` computes them."""
        set_device_streams()
        params = v2_attention.ExLlamaV2Attention.Params(ids.shape[0], ids.shape[1], past, None, None)
        x = ids if self._embedding is None else ids.to(self._embedding.weight.device, non_blocking=True)
        with self._own_embedding():
            for module in self._modules[: self._head_at if modules is None else modules]:
                if module.device_idx is not None and module.device_idx >= 0:
                    x = safe_move_tensor(x, module.device_idx, non_blocking=True)
                x = module.forward(x, cache=cache, attn_params=params, past_len=past, loras=None)
        torch.cuda.set_stream(self.model.get_device_context(x.device.index).stream)
        return x

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return self.body(ids)[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._modules[self._head_at].forward(hidden.contiguous())
        if self._cap:
            exllamav2_ext.softcap_(logits, self._cap)
        return logits

    # ------------------------------------------------------------------ several continuations on one context

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        limit = self.token_limit or 0
        longest = max(len(c) + _padded(max(map(len, t))) for c, t in zip(contexts, tails, strict=True))
        rows = max(len(t) * _padded(max(map(len, t))) for t in tails)
        room = max(map(len, tails)) * longest  # keys and values of all rows, side by side
        return longest <= min(limit, int(self.model.config.max_seq_len)) and rows <= limit and room <= 2 * limit

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        return torch.cat([part for c, t in zip(contexts, tails, strict=True) for part in self._tails(list(c), t)])

    def _tails(self, context: list[int], tails: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """A context in one cache, what it shares with the last one kept; its tails in the rows of another."""
        length = _padded(max(map(len, tails)))
        self._make_caches(len(tails), len(context) + length)
        kept = min(common_prefix(self._held, context), len(context))
        self._held = self._held[:kept]
        if len(context) > kept:
            self._trunk.current_seq_len = kept
            self.body(torch.tensor([context[kept:]]), self._trunk, kept, modules=self.model.last_kv_layer_idx + 1)
        self._held = context
        n = len(context)
        if n:
            self._trunk.copy_states(self._leaves, 0, n, 0, n, 0, 1, 0, len(tails))
        self._leaves.current_seq_len = n
        ids = torch.zeros((len(tails), length), dtype=torch.int64)
        for i, tail in enumerate(tails):
            ids[i, : len(tail)] = torch.tensor(list(tail))
        hidden = self.body(ids, self._leaves, n)
        return [hidden[i, : len(tail)] for i, tail in enumerate(tails)]

    def _make_caches(self, rows: int, length: int) -> None:
        """Room for `rows` rows of `length` tokens. One question's rows and another's length do not multiply."""
        length = -(-length // 256) * 256
        if self._trunk is None or self._trunk.max_seq_len < length:
            self._trunk, self._held = None, []  # the old one first
            self._trunk = ExLlamaV2Cache(self.model, batch_size=1, max_seq_len=length)
        if self._leaves is None or self._leaves.batch_size < rows or self._leaves.max_seq_len < length:
            self._leaves = None
            self._leaves = ExLlamaV2Cache(self.model, batch_size=max(4, rows), max_seq_len=length)

    def scoring_cache_bytes(self) -> int:
        """What the caches of `branch` take: no part of the model, and none of its KV pool."""
        caches = [c for c in (self._trunk, self._leaves) if c is not None]
        return sum(cache_bytes(c) for c in caches)


class ExLlamaV2Generator:
    """ExLlamaV2's dynamic generator. Without flash-attn it has no paged cache, and does one prompt after the other."""

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int, paged: bool) -> None:
        self.cache_tokens = int(cache.max_seq_len)
        self._generator = ExLlamaV2DynamicGenerator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs if paged else 1,
            max_q_size=1,
            paged=paged,
        )

    def submit(self, prompt: Prompt) -> None:
        job = ExLlamaV2DynamicJob(
            input_ids=torch.tensor([prompt.ids], dtype=torch.long),
            max_new_tokens=prompt.max_new,
            gen_settings=settings(prompt),
            seed=prompt.seed,
            stop_conditions=[*prompt.stop_tokens, *prompt.stop_strings],
            identifier=prompt.index,
        )
        self._generator.enqueue(job)

    def step(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def clear(self) -> None:
        for job in [*self._generator.active_jobs, *self._generator.pending_jobs]:
            self._generator.cancel(job)


def settings(prompt: Prompt) -> Any:
    """ExLlamaV2Sampler.Settings; its own defaults (temperature 0.8, top-k 50, repetition penalty) are undone."""
    s = prompt.sampling
    greedy = s.temperature == 0.0
    return ExLlamaV2Sampler.Settings(
        temperature=1.0 if greedy else s.temperature,
        top_k=1 if greedy else s.top_k,
        top_p=0.0 if greedy else s.top_p,
        min_p=s.min_p,
        token_repetition_penalty=s.repetition_penalty,
        token_presence_penalty=s.presence_penalty,
        token_frequency_penalty=s.frequency_penalty,
    )


class ExLlamaV2Model(ExLlamaLM):
    """EXL2 and GPTQ checkpoints, and unquantized ones in float16.

    Arguments of `ExLlamaLM`, and: device (cuda:1), gpu_split (GiB per GPU: 20/24; default: fill one after the other),
    cache_tokens (KV cache over all generations; 0: none), cache_bits (4, 6, 8; default fp16), max_jobs (generations at
    a time; one where flash-attn is missing), embedding_on_gpu (default: if they are small). max_length defaults to
    16352 where the model's own is longer.
    """

    engine_name = "exllamav2"
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


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    return sum(t.numel() * t.element_size() for t in cache.all_tensors() if t is not None)


def _padded(length: int) -> int:
    return -(-length // 32) * 32
