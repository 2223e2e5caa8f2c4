"""`llamacpp`: GGUF files in process, through llama-cpp-python.

Loading, generation and the vocabulary go through its `Llama`; scoring through llama.cpp's own batch calls, which
compute logits at the scored positions only. Tried with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.errors import UserError
from lmeval_ext.models.base import Quantization, WindowScoring, from_storage
from lmeval_ext.models.gguf_vocabulary import (
    ENGINE_VERSION,
    GGUFTokenizer,
    check_arguments,
    find_gguf,
    llama_cpp,
    load_llama,
    trained_context,
)
from lmeval_ext.models.llamacpp_generation import generate, sampling
from lmeval_ext.requests import WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens, wants_special_tokens

if TYPE_CHECKING:
    from lmeval_ext.divergence.observer import Observer

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 8192  # a model's full context may need more memory for its cache than for its weights


class LlamaCpp(WindowScoring, TemplateLM):
    """GGUF models in llama.cpp.

    pretrained: a .gguf file (any first part of a split one) or its folder. tokenizer: a Transformers tokenizer
    to tokenize with, for comparisons across families; without it the GGUF's own vocabulary. label: the name in
    tables and plots. max_length is llama.cpp's n_ctx (default: the model's context, 8192 at most). reference=
    and save_reference= measure divergence (docs/metrics.md). Everything else goes to llama_cpp.Llama under llama.cpp's
    names: n_gpu_layers (default: all where the build has a GPU), n_threads, n_batch, n_ubatch, flash_attn, type_k and
    type_v (names of ggml types, such as q8_0), rope_freq_base, …
    """

    reference_modes = ("logits",)

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        label: str | None = None,
        max_length: int | None = None,
        n_ctx: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        verbose: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.reference_arguments = ReferenceArguments.take(arguments)
        self.path = find_gguf(pretrained)
        self.label = label or Path(self.path).stem
        check_arguments(arguments)
        gpu = bool(llama_cpp.llama_supports_gpu_offload()) and device != "cpu"
        arguments.setdefault("n_gpu_layers", -1 if gpu else 0)
        if device == "cpu" and int(arguments["n_gpu_layers"]):
            raise UserError(f"device=cpu and n_gpu_layers={arguments['n_gpu_layers']} contradict each other; drop one")
        if max_length and n_ctx and int(max_length) != int(n_ctx):
            raise UserError(f"max_length={max_length} and n_ctx={n_ctx} are two names of one thing; give one")
        self._offloaded = gpu and int(arguments["n_gpu_layers"]) != 0
        for name in ("type_k", "type_v"):
            if isinstance(arguments.get(name), str):
                arguments[name] = _ggml_type(name, arguments[name])
        self._cache_types = (arguments.get("type_k"), arguments.get("type_v"))
        if not (max_length or n_ctx):
            n_ctx = min(trained_context(self.path) or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
        self._max_length = int(max_length or n_ctx or 0)
        self.llama = load_llama(self.path, verbose=verbose, n_ctx=self._max_length, **arguments)
        self._gguf = GGUFTokenizer(self.path, self.llama)
        self._hf = HFTokenizer(tokenizer, None, trust_remote_code, add_bos_token).transformers if tokenizer else None
        self.add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._max_gen_toks = max_gen_toks
        self._held: list[int] = []  # tokens whose keys and values stand in the cache, from position 0

    # ------------------------------------------------------------------ scoring

    @property
    def vocabulary(self) -> int:
        return int(self.llama.n_vocab())

    @property
    def max_length(self) -> int:
        return self._max_length

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        scores = []
        with self.progress(len(windows)) as done:
            for window in windows:
                look = None if self.observer is None else _Look(self.observer, window)
                found = self._score(window.context_ids, window.target_ids, reuse=False, look=look)
                scores.append(WindowScores.of(*found, None if look is None else look.found()))
                done(1)
        return scores

    def checkpoint(self) -> str | None:
        return self.path

    @property
    def tokenizer_may_differ(self) -> bool:
        return self._hf is None  # where a window's ids are the same, so is what is scored

    def _score(
        self, context: list[int], targets: list[int], reuse: bool, look: _Look | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(logprobs float32, greedy bool) of `targets` given `context`, each of shape [len(targets)].

        reuse: keep the cached part that the last call's tokens share with these. look: is shown the logits.
        """
        # The last token predicts nothing. Of a window it is fed all the same, as llama-perplexity does: kernels round
        # the last rows of a batch by how many there are, and K-quants' last scores would be others than its own
        fed = context + targets
        if reuse or len(fed) > self.max_length:
            del fed[-1]
        first, last = len(context) - 1, len(context) + len(targets) - 2  # positions whose logits are wanted
        start = self._rewind(fed, first) if reuse else self._rewind([], 0)
        memory_of = llama_cpp.llama_get_memory(self.llama.ctx)
        logprobs = np.empty(len(targets), dtype=np.float32)
        greedy = np.empty(len(targets), dtype=bool)
        batch = llama_cpp.llama_batch_init(self.llama.n_batch, 0, 1)
        try:
            for begin in range(start, len(fed), self.llama.n_batch):
                part = fed[begin : begin + self.llama.n_batch]
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i] = token, begin + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = first <= begin + i <= last
                code = llama_cpp.llama_decode(self.llama.ctx, batch)
                if code != 0:
                    llama_cpp.llama_memory_clear(memory_of, True)
                    self._held = []
                    raise UserError(
                        f"llama_decode returned {code} at token {begin} of {len(fed)}: out of memory or cache; lower "
                        "n_batch or eval_len, or raise n_ctx"
                    )
                wanted = range(max(begin, first), min(begin + len(part), last + 1))
                if len(wanted):
                    where = slice(wanted[0] - first, wanted[-1] + 1 - first)
                    logprobs[where], greedy[where] = self._read_logits(len(wanted), targets[where], look)
        finally:
            llama_cpp.llama_batch_free(batch)
        self._held = fed
        return logprobs, greedy

    def _rewind(self, fed: list[int], first: int) -> int:
        """Drop cached tokens that differ from `fed`, or whose logits are wanted; returns how many stay."""
        keep = 0
        while keep < min(len(self._held), len(fed), first) and self._held[keep] == fed[keep]:
            keep += 1
        memory = llama_cpp.llama_get_memory(self.llama.ctx)
        # recurrent models cannot drop a part: they refuse, and start afresh
        if keep == 0 or not llama_cpp.llama_memory_seq_rm(memory, 0, keep, -1):
            llama_cpp.llama_memory_clear(memory, True)
            keep = 0
        return keep

    def _read_logits(self, rows: int, targets: list[int], look: _Look | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Log-softmax in float32 of the last decode's logits at `targets`."""
        pointer = llama_cpp.llama_get_logits(self.llama.ctx)
        logits = np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
        top = logits.max(axis=1, keepdims=True)
        normalizer = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
        picked = logits[np.arange(rows), targets]
        if look is not None:
            look.at(logits, targets)
        return (picked - normalizer).astype(np.float32), logits.argmax(axis=1) == np.array(targets)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        if requests and isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests)
        requests = self.complete_requests(requests)
        # Sorted by their tokens, so that choices of one question follow each other and share its cached context
        order = Collator(requests, sort_fn=lambda r: tuple(r[1] + r[2]))
        answers = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for chunk in order.get_batched(n=1):
            for key, context, continuation in chunk:
                whole = (context + continuation)[-(self.max_length + 1) :]
                n = len(continuation)
                logprobs, greedy = self._score(whole[:-n], whole[-n:], reuse=True)
                answer = (float(logprobs.sum(dtype=np.float64)), bool(greedy.all()))
                answers.append(answer)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                progress.update()
        progress.close()
        return order.get_original(answers)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in tqdm([r.args for r in requests], disable=disable_tqdm):
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            answers = self._loglikelihood_tokens([(None, *w) for w in windows], disable_tqdm=True)
            total = sum(logprob for logprob, _ in answers)
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        results = []
        eos = self._gguf.piece(self.eot_token_id)
        self._held = []
        self.llama.reset()
        for context, gen_kwargs in tqdm([r.args for r in requests], disable=disable_tqdm, desc="Generating"):
            kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=self.max_gen_toks)}
            until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            tokens, n = maybe_truncate(
                self.tok_encode(context) or [self.prefix_token_id],
                max_gen_toks=self.check_new_tokens(int(kwargs.pop("max_gen_toks"))),
                max_model_len=self.max_length,
                side="left",
            )
            # A special token is no text; it ends an answer where a stop sequence is in its name
            ends = ending_tokens(self._gguf.special, until)
            stops = [u for u in until if u]
            ends |= self._gguf.ends
            text = generate(self.llama, tokens, n, ends, stops, sampling(kwargs), self.tok_decode)
            text = postprocess_generated_text(text, until, None)
            results.append(text)
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        self.llama.reset()
        return results

    # ------------------------------------------------------------------ tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. Special tokens as the tokenizer adds them, unless add_bos_token or add_special_tokens say
        otherwise; none before a text that begins with the prefix token."""
        prefix = self._piece(self.prefix_token_id)
        wanted = wants_special_tokens(string, add_special_tokens, self.add_bos_token, prefix)
        if self._hf is not None:
            return list(self._hf.encode(string, **({} if wanted is None else {"add_special_tokens": wanted})))
        ids = list(self.llama.tokenize(string.encode(), add_bos=False, special=True))
        bos = [] if self._gguf.bos_id is None else [self._gguf.bos_id]
        return (self._gguf.prefix if wanted is None else bos if wanted else []) + ids

    def tok_decode(self, tokens: list[int]) -> str:
        """Text of token ids, without special tokens; bytes that are no UTF-8 are U+FFFD."""
        if self._hf is not None:
            return str(self._hf.decode(tokens, skip_special_tokens=True))
        return b"".join(map(self._gguf.bytes_of, tokens)).decode(errors="replace")

    def _piece(self, token: int) -> str:
        return str(self._hf.decode([token])) if self._hf is not None else self._gguf.piece(token)

    @property
    def eot_token_id(self) -> int:
        return int(self.llama.token_eos())

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self._gguf.bos_id if self._gguf.bos_id is not None else self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return Path(self.path).name if self._hf is None else str(self._hf.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llama.metadata.get("tokenizer.chat_template") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._hf is not None and self._hf.chat_template:
            return str(
                self._hf.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        template = self.llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise UserError(f"{self.path!r} has no chat template; give tokenizer= a model that has one")
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        formatter = Jinja2ChatFormatter(
            template=template,
            eos_token=self._gguf.piece(self.eot_token_id),
            bos_token=self._gguf.piece(self._gguf.bos_id) if self._gguf.bos_id is not None else "",
            add_generation_prompt=add_generation_prompt,
        )
        return str(formatter(messages=chat_history).prompt)

    # ------------------------------------------------------------------ the record

    def describe(self) -> Quantization:
        facts = from_storage(
            self.checkpoint(),
            self._cache_types,
            label=self.label,
            engine="llama.cpp",
            engine_version=ENGINE_VERSION,
            kernel="ggml GPU backend" if self._offloaded else "ggml CPU backend",
            dtype=None,
            device="gpu" if self._offloaded else "cpu",
            scoring="logits",
        )
        if self._offloaded:
            facts.notes.append("peak_vram_gb unknown: llama.cpp does not tell through its bindings")
        return facts


class _Look:
    """Shows an observer the logits of one window, part by part."""

    def __init__(self, observer: Observer, window: WindowRequest) -> None:
        from lmeval_ext.divergence.store import key_of

        self._observer, self._key = observer, key_of(window)
        self._done, self._parts = 0, list[dict[str, np.ndarray]]()

    def at(self, logits: np.ndarray, targets: list[int]) -> None:
        """logits: float32 [tokens, vocabulary], of the next scored tokens; read at once, not kept."""
        import torch

        from lmeval_ext.divergence.measure import fetched
        from lmeval_ext.divergence.observer import WindowSpan

        span = WindowSpan(self._key, self._done, len(targets))
        found = self._observer.observe([span], None, torch.from_numpy(logits), torch.tensor(targets))
        self._parts.append(fetched(found))
        self._done += len(targets)

    def found(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}


def _ggml_type(argument: str, name: str) -> int:
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError:
        raise UserError(f"{argument}={name!r}: expected a ggml type such as f16, q8_0 or q4_0") from None
