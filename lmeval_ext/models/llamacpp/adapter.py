"""`llamacpp`: GGUF files in process, through llama-cpp-python.

Loading, generation and the vocabulary use its `Llama`; scoring uses llama.cpp's own batch calls, which compute logits
at the scored positions only. Tried with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from lmeval_ext.models.llamacpp.arguments import cache_label, switch, translated
from lmeval_ext.models.llamacpp.binding import ENGINE_VERSION
from lmeval_ext.models.llamacpp.contexts import Contexts, original_context
from lmeval_ext.models.llamacpp.deviations import DEVIATIONS
from lmeval_ext.models.llamacpp.generation import generate, generate_ids, sampling_arguments
from lmeval_ext.models.llamacpp.loading import GGUFModel, context_size, find_gguf, load_model, set_layers_on_gpu
from lmeval_ext.models.llamacpp.scoring import ContextScorer, LogitObserver, whole_cache
from lmeval_ext.models.llamacpp.vocabulary import GGUFTokenizer
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import Quantization, from_storage
from lmeval_ext.models.token_lm import TokenLM
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens


class LlamaCpp(Observed, TokenLM):
    """GGUF models in llama.cpp.

    pretrained: a .gguf file (any first part of a split one) or its folder. tokenizer: a Transformers tokenizer
    to tokenize with, for comparisons across families; without it the GGUF's own vocabulary. label: the name in
    tables and plots. max_length is llama.cpp's n_ctx (default: the model's context, 8192 at most). reference=
    and save_reference= measure divergence (docs/metrics.md). Everything else goes to llama_cpp.Llama under llama.cpp's
    names: n_gpu_layers (default: all if the build supports a GPU), n_threads, n_batch, n_ubatch, flash_attn, type_k and
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
        settings = translated(arguments)
        self.label = label or Path(self.path).stem + cache_label(settings.get("type_k"), settings.get("type_v"))
        add_bos_token = None if add_bos_token is None else switch("add_bos_token", add_bos_token)
        trust_remote_code = switch("trust_remote_code", trust_remote_code)
        model = GGUFModel.read(self.path, settings.get("kv_overrides"))
        self._architecture = model.architecture
        settings = model.rotary() | settings
        self._offloaded = set_layers_on_gpu(settings, device)
        self._cache_types = settings.get("type_k"), settings.get("type_v")
        self._max_length = context_size(model.trained_context, max_length, n_ctx)
        model.check(settings, self._max_length)
        self.llama, self._warnings = load_model(
            self.path, switch("verbose", verbose), n_ctx=self._max_length, **settings
        )
        self._gguf = GGUFTokenizer(self.path, self.llama)
        if tokenizer:
            self.tokenizer = HFTokenizer(tokenizer, None, trust_remote_code, add_bos_token).transformers
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self._max_gen_toks = max_gen_toks
        self.contexts = Contexts(self.llama, self._max_length, original_context(model))
        self.scorer = ContextScorer(self.llama, self.contexts, self._max_length, self.vocabulary)

    # ------------------------------------------------------------------ scoring

    @property
    def vocabulary(self) -> int:
        return int(self.llama.n_vocab())

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        scores = []
        with self.progress(len(windows)) as done:
            for window in windows:
                observer = None if self.observer is None else LogitObserver(self.observer, window)
                logprobs, greedy = self.scorer.score(window.context_ids, window.target_ids, False, observer)
                scores.append(WindowScores.of(logprobs, greedy, None if observer is None else observer.divergence()))
                done(1)
        return scores

    def score_choices(self, requests: Sequence[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        return self.scorer.choices(requests)

    @property
    def tokenizer_may_differ(self) -> bool:
        return self.tokenizer is None  # windows with the same ids are scored alike, whatever their text

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        self.scorer.forget()
        self.llama.reset()
        for context, gen_kwargs in tqdm([r.args for r in requests], disable=disable_tqdm, desc="Generating"):
            text = self._generate(context, gen_kwargs)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        self.llama.reset()
        return texts

    def _generate(self, context: str, gen_kwargs: dict[str, Any]) -> str:
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=self.max_gen_toks)}
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self._gguf.piece(self.eot_token_id))
        prompt, max_new = maybe_truncate(
            self.tok_encode(context) or [self.prefix_token_id],
            max_gen_toks=self.check_new_tokens(int(kwargs.pop("max_gen_toks"))),
            max_model_len=self.max_length,
            side="left",
        )
        self.contexts.select(len(prompt) + max_new - 1)  # the last new token is not fed
        if not whole_cache(self.llama):
            self.llama.reset()  # a prefix of the last prompt cannot be used again
        # A special token is not text; it ends the generation if its name contains a stop sequence
        ends = ending_tokens(self._gguf.special, until) | self._gguf.ends
        stops = [u for u in until if u]
        text = generate(self.llama, prompt, max_new, ends, stops, sampling_arguments(kwargs), self.tok_decode)
        return str(postprocess_generated_text(text, until, None))

    def answer_ids(self, requests: Sequence[AnswerRequest], done: Callable[[int], Any]) -> list[list[int]]:
        """Answers one prompt after the other, each in an empty cache, so that no answer depends on another."""
        self.scorer.forget()
        answers = []
        for request in requests:
            new, stop, temperature, seed = request.settings
            self.llama.reset()
            self.contexts.select(len(request.prompt_ids) + new - 1)  # the last new token is not fed
            ends = self._gguf.ends if stop else set()
            self.llama.set_seed(seed)
            arguments = sampling_arguments({"temperature": temperature})
            answers.append(generate_ids(self.llama, request.prompt_ids, new, ends, arguments))
            done(1)
        self.llama.reset()
        return answers

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
    def tokenizer_name(self) -> str:
        return Path(self.path).name if self.tokenizer is None else super().tokenizer_name

    # ------------------------------------------------------------------ chat

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._gguf.chat_template if chat_template else None

    def render_chat(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.tokenizer is not None and self.tokenizer.chat_template:
            return super().render_chat(chat_history, add_generation_prompt)
        return self._gguf.render_chat(chat_history, add_generation_prompt)

    # ------------------------------------------------------------------ the record

    def checkpoint(self) -> str | None:
        return self.path

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
        facts.notes += [f"llama.cpp warns: {line}" for line in self._warnings]
        if deviation := DEVIATIONS.get(self._architecture):
            facts.notes.append(deviation)
        if self._offloaded:
            facts.notes.append("peak_vram_gb unknown: llama.cpp does not tell through its bindings")
        return facts
