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
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.generation import generate, sampling
from lmeval_ext.models.llamacpp.loading import (
    ENGINE_VERSION,
    check_arguments,
    find_gguf,
    ggml_type,
    llama_cpp,
    load_llama,
    trained_context,
)
from lmeval_ext.models.llamacpp.scoring import LogitObserver, Scorer
from lmeval_ext.models.llamacpp.vocabulary import GGUFTokenizer
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import Quantization, from_storage
from lmeval_ext.models.token_lm import TokenLM
from lmeval_ext.requests import WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 8192  # a model's full context may need more memory for its cache than for its weights


class LlamaCpp(Observed, TokenLM):
    """GGUF models in llama.cpp.

    pretrained: a .gguf file (any first part of a split one) or its folder. tokenizer: a Transformers tokenizer
    to tokenize with, for comparisons across families; without it the GGUF's own vocabulary. label: the name in
    tables and plots. max_length is llama.cpp's n_ctx (default: the model's context, 8192 at most). reference=
    and save_reference= measure divergence (docs/metrics.md). Everything else goes to llama_cpp.Llama under llama.cpp's
    names: n_gpu_layers (default: all where the build has a GPU), n_threads, n_batch, n_ubatch, flash_attn, type_k and
    type_v (names of ggml types, such as q8_0), rope_freq_base, …
    """

    engine_packages = ("llama-cpp-python",)
    context_argument = "max_length"
    needs_tokenizer = True
    neutral_arguments = frozenset({"n_ctx", "n_threads", "n_threads_batch", "n_batch", "n_ubatch", "verbose"})
    texts_at_once = 1  # an interrupted run keeps the texts that are done

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
        self.take_reference_arguments(arguments)
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
                arguments[name] = ggml_type(name, arguments[name])
        self._cache_types = (arguments.get("type_k"), arguments.get("type_v"))
        if not (max_length or n_ctx):
            n_ctx = min(trained_context(self.path) or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
        self._max_length = int(max_length or n_ctx or 0)
        self.llama = load_llama(self.path, verbose=verbose, n_ctx=self._max_length, **arguments)
        self._gguf = GGUFTokenizer(self.path, self.llama)
        if tokenizer:
            self.tokenizer = HFTokenizer(tokenizer, None, trust_remote_code, add_bos_token).transformers
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self._max_gen_toks = max_gen_toks
        self.scorer = Scorer(self.llama, self._max_length, self.vocabulary)

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
                observer = None if self.observer is None else LogitObserver(self.observer, window)
                logprobs, greedy = self.scorer.score(window.context_ids, window.target_ids, False, observer)
                scores.append(WindowScores.of(logprobs, greedy, None if observer is None else observer.divergence()))
                done(1)
        return scores

    def checkpoint(self) -> str | None:
        return self.path

    @property
    def tokenizer_may_differ(self) -> bool:
        return self.tokenizer is None  # where a window's ids are the same, so is what is scored

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
                logprobs, greedy = self.scorer.score(whole[:-n], whole[-n:], reuse=True)
                answer = (float(logprobs.sum(dtype=np.float64)), bool(greedy.all()))
                answers.append(answer)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                progress.update()
        progress.close()
        return order.get_original(answers)

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        results = []
        eos = self._gguf.piece(self.eot_token_id)
        self.scorer.forget()
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

    def encode_text(self, string: str, special: bool | None) -> list[int]:
        if self.tokenizer is not None:
            return super().encode_text(string, special)
        ids = list(self.llama.tokenize(string.encode(), add_bos=False, special=True))
        bos = [] if self._gguf.bos_id is None else [self._gguf.bos_id]
        return (self._gguf.prefix if special is None else bos if special else []) + ids

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        if self.tokenizer is not None:
            return super().tok_decode(tokens, skip_special_tokens)
        return b"".join(map(self._gguf.bytes_of, tokens)).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return super().token_text(token) if self.tokenizer is not None else self._gguf.piece(token)

    @property
    def eot_token_id(self) -> int:
        return int(self.llama.token_eos())

    @property
    def bos_token_id(self) -> int | None:
        return self._gguf.bos_id

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return Path(self.path).name if self.tokenizer is None else super().tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llama.metadata.get("tokenizer.chat_template") if chat_template else None

    def render_chat(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.tokenizer is not None and self.tokenizer.chat_template:
            return super().render_chat(chat_history, add_generation_prompt)
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
