"""What `exllamav3` and `exllamav2` share: the harness' side of both adapters.

Each engine's file loads a model and gives an `Engine` (exllama_batching.py) and a `Generator` (exllama_generation.py);
this class turns the harness' requests into theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.divergence.dense_head import dense_head
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.models.base import GIB, Quantization, WindowScoring, default_label, from_storage
from lmeval_ext.models.choices import group_requests
from lmeval_ext.models.exllama_batching import Batching, Engine
from lmeval_ext.models.exllama_config import context_length, find_checkpoint, read_json, stop_tokens, text_config
from lmeval_ext.models.exllama_generation import Generator, Prompt, Sampling, generate
from lmeval_ext.models.exllama_scoring import Scorer
from lmeval_ext.requests import WindowRequest, WindowScores
from lmeval_ext.tokens import HFTokenizer, ending_tokens, special_tokens, wants_special_tokens

logger = logging.getLogger(__name__)


class ExLlamaLM(WindowScoring, TemplateLM):
    """A checkpoint folder on an ExLlama engine; see `exllamav3` and `exllamav2` for the engines' own arguments.

    pretrained: folder or hub id (revision=: its branch). tokenizer: another folder or id to tokenize with. label: the
    name in tables and plots. max_length: default the model's own. batch_size: windows or choices a forward; "auto"
    takes it from free memory, up to max_batch_size. add_bos_token, prefix_token_id, think_end_token, enable_thinking,
    chat_template_args: as in the harness' `hf`. reference, save_reference: measure divergence (docs/metrics.md).
    """

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
        self.reference_arguments = ReferenceArguments.take(engine_arguments)
        self.folder = find_checkpoint(pretrained, revision)
        self.label, self.revision = label or default_label(pretrained), revision
        self.config = read_json(self.folder / "config.json")
        source = str(self.folder) if tokenizer in (None, pretrained) else str(tokenizer)
        self.tokenizer = HFTokenizer(source, None, trust_remote_code, add_bos_token).transformers
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self.think_end_token, self._max_gen_toks = think_end_token, int(max_gen_toks)
        self._template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_args["enable_thinking"] = enable_thinking
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

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [text for (text,) in (r.args for r in requests)]
        windows = [
            (number, window)
            for number, text in enumerate(texts)
            for window in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
        ]
        totals = [0.0] * len(texts)
        scored = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm=disable_tqdm)
        for (number, _), (logprob, _) in zip(windows, scored, strict=True):
            totals[number] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

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

    def _prompt(self, index: int, context: str, gen_kwargs: dict[str, Any]) -> tuple[Prompt, list[str]]:
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
        prompt = Prompt(
            index=index,
            ids=self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id],
            max_new=max_new,
            stop_tokens=sorted(stops),
            stop_strings=[u for u in until if u and u not in special],
            sampling=Sampling.of(kwargs),
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

    # ------------------------------------------------------------------ tokens, with the meaning they have in `hf`

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text. Special tokens as the tokenizer adds them, unless add_bos_token or add_special_tokens say
        otherwise; none before a text that begins with the prefix token."""
        prefix = self.tokenizer.decode([self.prefix_token_id])
        wanted = wants_special_tokens(string, add_special_tokens, self.add_bos_token, prefix)
        ids = list(self.tokenizer.encode(string, **({} if wanted is None else {"add_special_tokens": wanted})))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self.custom_prefix_token_id is not None:
            return int(self.custom_prefix_token_id)
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def render(history: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self._template_args,
                )
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template takes no system message; it is left out")
            return render([m for m in chat_history if m["role"] != "system"])

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


_EMBEDDING_SHARE = 0.05  # of a GPU's memory: token embeddings up to that are held there while scoring


def gpu_embedding(first: Any, device: Any, wanted: bool | None) -> torch.nn.Embedding | None:
    """A copy of the token embeddings for scoring; None where they stay where they are.

    first: the engine's embedding module. device: of its first layer. wanted: None: if they are small.
    """
    weight = getattr(getattr(first, "embedding", None), "weight", None)
    if wanted is False or not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    device = torch.device(device)
    if wanted is None and weight.nbytes > _EMBEDDING_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    return torch.nn.Embedding(*weight.shape, _weight=weight.data.to(device), _freeze=True)


def allocated_bytes() -> int:
    """GPU memory that this process' tensors take, all GPUs together."""
    return sum(torch.cuda.memory_allocated(d) for d in range(torch.cuda.device_count()))


def reset_peak_memory() -> None:
    """Let `measured_memory` count from here."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def measured_memory(facts: Quantization, kv_bytes: int, weights_bytes: int | None) -> Quantization:
    """Peak GPU memory since the last reset, all GPUs of this process together, without the KV cache."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        facts.peak_vram_gb = (peak - kv_bytes) / GIB
        facts.kv_pool_gb = kv_bytes / GIB
        if weights_bytes is not None:
            facts.weight_vram_gb = weights_bytes / GIB
    return facts


def quantized_cache(facts: Quantization, bits: tuple[int, int] | None) -> Quantization:
    """A cache of so many bits for keys and values: groups of 32 elements share a float16 scale."""
    if bits is not None:
        facts.kv_cache_dtype = f"q{bits[0]}" if bits[0] == bits[1] else f"q{bits[0]}/q{bits[1]}"
        if facts.kv_bytes_per_token is not None:
            facts.kv_bytes_per_token = round(facts.kv_bytes_per_token * (bits[0] + bits[1] + 1) / 32)
    return facts


def default_cache_tokens(total_bytes: int, bytes_per_token: int | None, max_length: int, asked_length: bool) -> int:
    """Tokens of the KV cache where none are asked for: a tenth of the GPU, 32768 at most, 8192 or the model's at least.

    asked_length: whether max_length was asked for; the cache then holds one sequence of it.
    """
    least = max_length if asked_length else min(max_length, 8192)
    tokens = least if not bytes_per_token else max(least, min(32768, total_bytes // 10 // bytes_per_token))
    return -(-tokens // 256) * 256


def activation_bytes(config: dict[str, Any]) -> int:
    """What a forward needs a token, roughly: a few float32 states and the MLP's inner ones."""
    text = text_config(config)
    hidden, inner = int(text.get("hidden_size") or 4096), text.get("intermediate_size")
    experts = int(text.get("num_experts_per_tok") or 1)
    width = int(inner) if isinstance(inner, int) else 4 * hidden
    return 4 * (8 * hidden + 4 * width * experts)
