"""Connects vLLM's model runners to our scorer: every private name of vLLM that scoring relies on is here.

vLLM has two runners. V1 (`gpu_model_runner.GPUModelRunner`, and the CPU's) calls `_get_prompt_logprobs_dict` after each
step; V2 (`worker.gpu.model_runner`, the default for dense models on a GPU) calls its `prompt_logprobs_worker`. Both
calls receive the step's hidden states on the ranks that have them. A wrapper scores our requests and passes the call
on, so that `prompt_logprobs` of other requests keep working. Nothing else in the runners changes.

Tested with vLLM 0.26 (V1 and V2 on a GPU) and 0.32 (V1 on a CPU). tests/models/vllm/test_scoring.py fails when a name
changes; scoring then falls back to `prompt_logprobs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm.scoring import PromptScorer, Span, Step, scored_span, to_device


def install(runner: Any) -> PromptScorer:
    """Adds a scorer to a runner. Raises AttributeError if this vLLM's runner is not one of the two."""
    scorer = PromptScorer(runner.model.compute_logits, int(runner.model_config.get_vocab_size()))
    if hasattr(runner, "prompt_logprobs_worker"):
        if runner.prompt_logprobs_worker is not None:  # only the last pipeline rank has one
            runner.prompt_logprobs_worker = _V2Worker(runner.prompt_logprobs_worker, scorer)
    else:
        _install_v1(runner, scorer)
    return scorer


def _install_v1(runner: Any, scorer: PromptScorer) -> None:
    ordinary = runner._get_prompt_logprobs_dict

    def scored(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        step = _v1_step(runner, num_scheduled_tokens)
        if step is not None:
            scorer.add(hidden_states, step)
        return ordinary(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = scored


def _v1_step(runner: Any, num_scheduled_tokens: dict[str, int]) -> Step | None:
    spans: list[Span] = []
    rows: list[np.ndarray] = []
    targets: list[int] = []
    for request_id, count in num_scheduled_tokens.items():
        request = runner.requests[request_id]
        if request.sampling_params is None or request.prompt_token_ids is None:
            continue
        first, prompt = request.num_computed_tokens, request.prompt_token_ids
        span = scored_span(request.sampling_params.extra_args, first, count, len(prompt))
        if span is None:
            continue
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
        spans.append(span)
        rows.append(np.arange(span.count) + (offset + span.start - 1 - first))
        targets += prompt[span.start : span.start + span.count]
    if not spans:
        return None
    return Step(spans, np.concatenate(rows), to_device(torch.tensor(targets, dtype=torch.int64), runner.device))


class _V2Worker:
    """Wraps V2's `PromptLogprobsWorker`; everything but our requests goes to the original."""

    def __init__(self, original: Any, scorer: PromptScorer) -> None:
        self._original, self._scorer = original, scorer
        self._extra_args: dict[str, dict[str, Any]] = {}  # of the requests to score

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        if scored_span(sampling_params.extra_args, 0, 1 << 60, 1 << 60):
            self._extra_args[req_id] = sampling_params.extra_args
        self._original.add_request(req_id, req_idx, sampling_params)

    def remove_request(self, req_id: str) -> None:
        self._extra_args.pop(req_id, None)
        self._original.remove_request(req_id)

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> Any:
        step = self._step(input_batch, all_token_ids, prompt_lens) if self._extra_args else None
        if step is not None:
            self._scorer.add(hidden_states, step)
        return self._original.compute_prompt_logprobs(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )

    def _step(self, batch: Any, all_token_ids: torch.Tensor, prompt_lens: np.ndarray) -> Step | None:
        spans: list[Span] = []
        rows: list[np.ndarray] = []
        places: list[np.ndarray] = []  # [2, tokens]: row and column in all_token_ids [requests, positions]
        for i, request_id in enumerate(batch.req_ids):
            slot, first = int(batch.idx_mapping_np[i]), int(batch.num_computed_prefill_tokens_np[i])
            count, prompt = int(batch.num_scheduled_tokens[i]), int(prompt_lens[slot])
            span = scored_span(self._extra_args.get(request_id), first, count, prompt)
            if span is None:
                continue
            tokens = np.arange(span.count)
            spans.append(span)
            rows.append(tokens + (int(batch.query_start_loc_np[i]) + span.start - 1 - first))
            places.append(np.stack([np.full(span.count, slot), tokens + span.start]))
        if not spans:
            return None
        at = to_device(torch.from_numpy(np.concatenate(places, axis=1)), all_token_ids.device)
        return Step(spans, np.concatenate(rows), all_token_ids[at[0], at[1]].to(torch.int64))


def watch_head_input(runner: Any) -> Callable[[], torch.Tensor | None]:
    """Records what the logits are computed from, which some models scale first; returns a function that reads it."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen[:] = [keywords.get("hidden_states", arguments[1] if len(arguments) > 1 else None)]

    forget_head_input(runner)
    runner.lmeval_ext_watch = _logits_processor(runner).register_forward_pre_hook(keep, with_kwargs=True)
    return lambda: seen[0] if seen else None


def forget_head_input(runner: Any) -> None:
    """Undoes `watch_head_input`."""
    watch = runner.__dict__.pop("lmeval_ext_watch", None)
    if watch is not None:
        watch.remove()


def logits_device(runner: Any) -> torch.device | None:
    """Device of a runner's logits; None on the ranks of a pipeline that have none."""
    from vllm.distributed import get_pp_group

    alone = runner.vllm_config.parallel_config.pipeline_parallel_size == 1
    return torch.device(runner.device) if alone or get_pp_group().is_last_rank else None


class _SeenError(Exception):
    """Ends a call of which only the arguments are of interest."""


def output_head(runner: Any) -> OutputHead:
    """The output matrix, and what vLLM's LogitsProcessor does after it. Raises UserError if quantized or split."""
    processor = _logits_processor(runner)
    seen: list[tuple[Any, Any]] = []

    def keep(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = dict(zip(("lm_head", "hidden_states", "embedding_bias"), arguments, strict=False)) | keywords
        seen.append((given.get("lm_head"), given.get("embedding_bias")))
        raise _SeenError  # before the product: the head may be narrower than the model (OPT's word_embed_proj_dim)

    handle = processor.register_forward_pre_hook(keep, with_kwargs=True)
    try:  # only a model knows which of its layers is the head, and passes it to the processor
        width = int(runner.model_config.get_hidden_size())
        with torch.inference_mode(), contextlib.suppress(_SeenError):
            runner.model.compute_logits(torch.zeros(1, width, dtype=runner.model_config.dtype, device=runner.device))
    finally:
        handle.remove()
    layer, bias = seen[0]
    weight = getattr(layer, "weight", None)
    vocabulary = int(runner.model_config.get_vocab_size())
    dense = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if weight is None or not dense or weight.shape[0] < vocabulary:
        raise UserError(
            "save_reference=: the output matrix is quantized, or split over GPUs; use reference_mode=logits"
        )
    bias = getattr(layer, "bias", None) if bias is None else bias
    return OutputHead(weight.data, None if bias is None else bias.data, processor.soft_cap, float(processor.scale))


def _logits_processor(runner: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    processors = [m for m in runner.model.modules() if isinstance(m, LogitsProcessor)]
    if not processors:
        raise UserError("save_reference=: this model computes its logits without vLLM's LogitsProcessor; use hf_quant")
    return processors[0]


def kv_cache_tensors(runner: Any) -> list[torch.Tensor]:
    """Tensors of the preallocated KV cache, one or more per layer."""
    return _tensors(runner.kv_caches)


def weight_bytes(runner: Any) -> int | None:
    """Bytes that loading the model took on this device, by vLLM's own measurement."""
    measured = getattr(runner, "model_memory_usage", None)
    return int(measured) if measured else None


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [t for part in tree for t in _tensors(part)]
    return [tree] if hasattr(tree, "nbytes") else []
