"""`ExLlamaLM`: what `exllamav3` and `exllamav2` share, the harness' side of both adapters.

Each engine's folder loads a model and returns an `Engine` (engine.py) and a `JobGenerator` (generation.py); this class
translates the harness' requests for them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from lmeval_ext.divergence.dense_head import dense_head
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.models.exllama.batching import Batching
from lmeval_ext.models.exllama.config import context_length, read_json, stop_tokens
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.generation import GenerationJob, JobGenerator, generate
from lmeval_ext.models.exllama.loading import find_checkpoint
from lmeval_ext.models.exllama.scoring import EngineScorer
from lmeval_ext.models.loading import default_label
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import Quantization, from_storage
from lmeval_ext.models.sampling import Sampling
from lmeval_ext.models.shared_contexts import group_requests
from lmeval_ext.models.token_lm import TokenLM
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens, special_tokens

CACHE_UNUSED = "cache_bits concerns generated text: token windows are scored without the KV cache"


class ExLlamaLM(Observed, TokenLM):
    """A checkpoint folder on an ExLlama engine; see `exllamav3` and `exllamav2` for the engines' own arguments.

    pretrained: folder or hub id (revision=: its branch). tokenizer: another folder or id to tokenize with. label: the
    name in tables and plots. max_length: default the model's own. batch_size: windows or choices per forward; "auto"
    chooses it from free memory, up to max_batch_size. add_bos_token, prefix_token_id, think_end_token, enable_thinking,
    chat_template_args: as in the harness' `hf`. reference, save_reference: measure divergence (docs/metrics.md).
    """

    reference_modes = ("hidden", "logits")
    neutral_arguments = frozenset({"cache_tokens", "max_jobs", "embedding_on_gpu"})
    engine_name = ""
    engine_version: str | None = None
    dtype = torch.float16  # both engines compute in it, and hold matrices that are not quantized in it
    cache_bits: tuple[int, int] | None = None  # of keys and values; None: float16
    windowed_cache = True  # whether the cache drops tokens that have left a sliding window

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        label: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        **engine_arguments: Any,
    ) -> None:
        super().__init__()
        self.take_reference_arguments(engine_arguments)
        self.folder = find_checkpoint(pretrained, revision)
        self.label, self.revision = label or default_label(pretrained), revision
        self.config = read_json(self.folder / "config.json")
        source = str(self.folder) if tokenizer in (None, pretrained) else str(tokenizer)
        self.tokenizer = HFTokenizer(source, None, trust_remote_code, add_bos_token).transformers
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self.think_end_token, self._max_gen_toks = think_end_token, int(max_gen_toks)
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.length_is_given = bool(max_length)
        self._max_length = int(max_length or context_length(self.config, self.tokenizer))
        self._batch_size = batch_size
        self.engine: Engine = self.load(**engine_arguments)
        self.batching = Batching(self.engine, batch_size, max_batch_size)
        self.scorer = EngineScorer(self.engine, self.batching)

    # ------------------------------------------------------------------ what an engine implements

    @abstractmethod
    def load(self, **arguments: Any) -> Engine:
        """Loads self.folder with the engine's own arguments. May lower `_max_length` if no max_length is given."""

    @abstractmethod
    def generator(self) -> JobGenerator:
        """Returns the engine's generator, ready for new jobs. Raises UserError if it has no cache."""

    @abstractmethod
    def describe_engine(self, facts: Quantization) -> Quantization:
        """Adds what the engine knows: kernel, memory, notes."""

    # ------------------------------------------------------------------ scoring

    @property
    def vocabulary(self) -> int:
        return int(self.engine.vocabulary)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def batch_size(self) -> int | str:
        return self._batch_size

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        with self.progress(len(windows)) as done:
            return self.scorer.windows(windows, done, self.observer)

    def score_choices(self, requests: Sequence[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        return self.scorer.choices(group_requests(requests, self.max_length))

    @property
    def windows_at_once(self) -> int:
        return 16 if self.engine.device.type == "cuda" else 1

    @property
    def logits_device(self) -> torch.device:
        return self.engine.device

    def output_head(self) -> OutputHead:
        """The output matrix as the engine holds it, in its own dtype."""
        head = dense_head(self.folder)
        bias = None if head.bias is None else head.bias.to(self.dtype)
        return replace(head, weight=head.weight.to(self.dtype), bias=bias)

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not requests:
            return []
        jobs, stop_texts = [], []
        for index, request in enumerate(requests):
            job, until = self.generation_job(index, *request.args)
            jobs.append(job)
            stop_texts.append(until)
        jobs.sort(
            key=lambda job: (-len(job.ids), job.ids)
        )  # the longest first, so that none of them runs alone at last
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for index, ids in generate(self.generator(), jobs):
                texts[index] = self.generated_text(ids, stop_texts[index])
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                bar.update()
        return texts

    def answer_ids(self, requests: Sequence[AnswerRequest], done: Callable[[int], Any]) -> list[list[int]]:
        ends = sorted({self.eot_token_id, *stop_tokens(self.folder, self.config)})
        jobs = [
            GenerationJob(
                index=index,
                ids=request.prompt_ids,
                max_new=request.settings.max_new,
                stop_tokens=ends if request.settings.stop else [],
                sampling=Sampling(temperature=request.settings.temperature),
                seed=request.settings.seed,
            )
            for index, request in enumerate(requests)
        ]
        answers: dict[int, list[int]] = {}
        for index, ids in generate(self.generator(), jobs):
            answers[index] = ids
            done(1)
        return [answers[index] for index in range(len(requests))]

    def generation_job(self, index: int, context: str, gen_kwargs: dict[str, Any]) -> tuple[GenerationJob, list[str]]:
        """Returns the job of a request, and the request's stop sequences. Raises UserError for bad arguments."""
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        max_new = self.check_new_tokens(int(kwargs.pop("max_gen_toks")))
        special = special_tokens(self.tokenizer)
        stops = {
            self.eot_token_id,
            *stop_tokens(self.folder, self.config),
            *ending_tokens(special, until),
        }
        job = GenerationJob(
            index=index,
            ids=self.tok_encode(context, left_truncate_len=self.max_length - max_new) or [self.prefix_token_id],
            max_new=max_new,
            stop_tokens=sorted(stops),
            stop_strings=[u for u in until if u and u not in special],
            sampling=Sampling.of(kwargs, "ExLlama"),
        )
        return job, until

    def generated_text(self, ids: list[int], until: list[str]) -> str:
        """Returns the text of generated ids as the harness' `hf` reads it.

        Without thinking and special tokens, and only up to the first stop sequence.
        """
        think = self.think_end_token
        if isinstance(think, int) and think in ids:
            ids = ids[len(ids) - ids[::-1].index(think) :]
        text = self.tok_decode(ids)
        if isinstance(think, int):
            text = text.lstrip()
        return str(postprocess_generated_text(text, until, think if isinstance(think, str) else None))

    # ------------------------------------------------------------------ the record

    def checkpoint(self) -> str | None:
        return str(self.folder)

    def describe(self) -> Quantization:
        key, value = (f"q{bits}" for bits in self.cache_bits) if self.cache_bits else ("float16", "float16")
        facts = from_storage(
            self.checkpoint(),
            (key, value),
            windowed_cache=self.windowed_cache,
            label=self.label,
            engine=self.engine_name,
            engine_version=self.engine_version,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.engine.device),
            revision=self.revision,
            scoring="engine",
        )
        if self.cache_bits is not None:
            facts.notes.append(CACHE_UNUSED)
        return self.describe_engine(facts)
