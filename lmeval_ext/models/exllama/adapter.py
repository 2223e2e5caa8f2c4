"""What `exllamav3` and `exllamav2` share: the harness' side of both adapters.

Each engine's file loads a model and gives an `Engine` (exllama_batching.py) and a `Generator` (exllama_generation.py);
this class turns the harness' requests into theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from lmeval_ext.models.exllama.config import context_length, find_checkpoint, read_json, stop_tokens
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.generation import GenerationJob, Generator, generate
from lmeval_ext.models.exllama.scoring import Scorer
from lmeval_ext.models.loading import default_label
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import Quantization, from_storage
from lmeval_ext.models.sampling import Sampling
from lmeval_ext.models.shared_contexts import group_requests
from lmeval_ext.models.token_lm import TokenLM
from lmeval_ext.requests import WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens, special_tokens

logger = logging.getLogger(__name__)


class ExLlamaLM(Observed, TokenLM):
    """A checkpoint folder on an ExLlama engine; see `exllamav3` and `exllamav2` for the engines' own arguments.

    pretrained: folder or hub id (revision=: its branch). tokenizer: another folder or id to tokenize with. label: the
    name in tables and plots. max_length: default the model's own. batch_size: windows or choices a forward; "auto"
    takes it from free memory, up to max_batch_size. add_bos_token, prefix_token_id, think_end_token, enable_thinking,
    chat_template_args: as in the harness' `hf`. reference, save_reference: measure divergence (docs/metrics.md).
    """

    reference_modes = ("hidden", "logits")
    neutral_arguments = frozenset({"cache_tokens", "max_jobs", "embedding_on_gpu"})
    engine_name = ""
    engine_version: str | None = None
    dtype = torch.float16  # both engines compute in it, and hold matrices that are not quantized in it

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
        self.asked_length = bool(max_length)
        self._max_length = int(max_length or context_length(self.config, self.tokenizer))
        self._batch_size = batch_size
        self.engine: Engine = self.load(**engine_arguments)
        self.batching = Batching(self.engine, batch_size, max_batch_size)
        self.scorer = Scorer(self.engine, self.batching)

    # ------------------------------------------------------------------ what an engine's class adds

    def load(self, **arguments: Any) -> Engine:
        """Load self.folder with the engine's own arguments."""
        raise NotImplementedError

    def generator(self) -> Generator:
        """The engine's generator, ready for new jobs. UserError where there is no cache for it."""
        raise NotImplementedError

    def facts(self, facts: Quantization) -> Quantization:
        """Add what the engine knows: kernel, memory, notes."""
        raise NotImplementedError

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

    @property
    def windows_at_once(self) -> int:
        return 16 if self.engine.device.type == "cuda" else 1

    @property
    def logits_device(self) -> torch.device:
        return self.engine.device

    def output_head(self) -> OutputHead:
        """As the engine holds it, in its own dtype."""
        head = dense_head(self.folder)
        bias = None if head.bias is None else head.bias.to(self.dtype)
        return replace(head, weight=head.weight.to(self.dtype), bias=bias)

    def checkpoint(self) -> str | None:
        return str(self.folder)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        if requests and isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests)
        requests = self.complete_requests(requests)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for index, answer in self.scorer.choices(group_requests(requests, self.max_length)):
            answers[index] = answer
            key = requests[index][0]
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            progress.update()
        progress.close()
        return answers

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not requests:
            return []
        arguments = [r.args for r in requests]
        prompts, untils = [], []
        for index, (context, gen_kwargs) in enumerate(arguments):
            prompt, until = self._prompt(index, context, gen_kwargs)
            prompts.append(prompt)
            untils.append(until)
        prompts.sort(key=lambda p: (-len(p.ids), p.ids))  # the longest first: no single one is left at the end
        results = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for index, ids in generate(self.generator(), prompts):
            results[index] = self._text(ids, untils[index])
            self.cache_hook.add_partial("generate_until", arguments[index], results[index])
            progress.update()
        progress.close()
        return results

    def _prompt(self, index: int, context: str, gen_kwargs: dict[str, Any]) -> tuple[GenerationJob, list[str]]:
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        max_new = self.check_new_tokens(int(kwargs.pop("max_gen_toks")))
        room = self.max_length - max_new
        special = special_tokens(self.tokenizer)
        stops = {
            self.eot_token_id,
            *stop_tokens(self.folder, self.config),
            *ending_tokens(special, until),
        }
        prompt = GenerationJob(
            index=index,
            ids=self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id],
            max_new=max_new,
            stop_tokens=sorted(stops),
            stop_strings=[u for u in until if u and u not in special],
            sampling=Sampling.of(kwargs, "ExLlama"),
        )
        return prompt, until

    def _text(self, ids: list[int], until: list[str]) -> str:
        """As the harness' `hf` reads a generation: thinking cut off, special tokens out, up to a stop sequence."""
        think = self.think_end_token
        if isinstance(think, int) and think in ids:
            ids = ids[len(ids) - ids[::-1].index(think) :]
        text = self.tok_decode(ids)
        if isinstance(think, int):
            text = text.lstrip()
        return str(postprocess_generated_text(text, until, think if isinstance(think, str) else None))

    # ------------------------------------------------------------------ the record

    def describe(self) -> Quantization:
        device = self.engine.device
        facts = from_storage(
            self.checkpoint(),
            ("float16", "float16"),
            label=self.label,
            engine=self.engine_name,
            engine_version=self.engine_version,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(device),
            revision=self.revision,
            scoring="engine",
        )
        return self.facts(facts)
