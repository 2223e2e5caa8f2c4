"""Code that runs inside vLLM's workers, next to the weights, through vLLM's `worker_extension_cls`.

Methods are called by name with `LLM.collective_rpc`; the names have our prefix, because vLLM adds this class to the
bases of its own worker. Tested with vLLM 0.26 (GPU) and 0.32 (CPU).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.observer import Saving
from lmeval_ext.divergence.plan import ObservationPlan, cut_head, head_facts
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.models.vllm import long_rope, runners
from lmeval_ext.models.vllm.layer_kernels import layer_kernels as _kernels
from lmeval_ext.models.vllm.layer_kernels import watch_choices
from lmeval_ext.models.vllm.scoring import PromptScorer


class WorkerExtension:
    """Scoring, and facts that only a worker knows."""

    model_runner: Any  # vLLM's worker has it
    lmeval_ext_scorer: PromptScorer
    lmeval_ext_head: OutputHead | None

    def lmeval_ext_install(self) -> str | None:
        """Starts scoring the requests that ask for it. Idempotent. Returns None, or why this vLLM cannot."""
        if hasattr(self, "lmeval_ext_scorer"):
            return None
        try:
            watch_choices(self.lmeval_ext_model())
            self.lmeval_ext_scorer = runners.install(self.model_runner)
        except (AttributeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def lmeval_ext_long_rope(self) -> list[int]:
        """Original contexts of the rotary embeddings that have two sets of factors."""
        modules = long_rope.rotary_modules(self.model_runner.model)
        return sorted({int(module.original_max_position_embeddings) for module in modules})

    def lmeval_ext_switch_long_rope(self, long: bool | None) -> None:
        """Takes long or short factors from now on; None: vLLM's own choice."""
        long_rope.switch(self.model_runner.model, long)

    def lmeval_ext_observe(self, plan: dict[str, Any] | None) -> dict[str, Any]:
        """Observes the logits of windows by an `ObservationPlan` (as a dictionary); None stops observing.

        Returns `head_facts`, or {}.
        """
        scorer = self.lmeval_ext_scorer
        scorer.stop_observing()
        scorer.head_input, self.lmeval_ext_head = lambda: None, None
        if plan is None:
            runners.forget_head_input(self.model_runner)
            return {}
        observed = ObservationPlan(**{**plan, "keys": tuple(plan["keys"])})
        if observed.save:
            scorer.head_input = runners.watch_head_input(self.model_runner)
        if observed.needs_head:
            self.lmeval_ext_head = cut_head(runners.output_head(self.model_runner), observed.vocabulary)
        scorer.observer = observed.observer(self.lmeval_ext_head, runners.logits_device(self.model_runner))
        return {} if self.lmeval_ext_head is None else head_facts(self.lmeval_ext_head)

    def lmeval_ext_write_head(self, folder: str) -> None:
        """Writes the observed output matrix into the store in a folder."""
        assert self.lmeval_ext_head is not None
        ReferenceStore.open(folder).write_head(self.lmeval_ext_head)

    def lmeval_ext_take_states(self, tokens: dict[str, int]) -> bytes | None:
        """Tensors kept from windows, as safetensors: {"KEY name": tensor}; None on a rank that kept none."""
        observer = self.lmeval_ext_scorer.observer
        if not isinstance(observer, Saving) or not observer.has(tokens):
            return None
        states = {key: observer.take(key, count) for key, count in tokens.items()}
        return save({f"{key} {name}": t for key, tensors in states.items() for name, t in tensors.items()})

    def lmeval_ext_take(self) -> dict[str, Any] | None:
        """Returns the scores since the last call, as `PromptScorer.take` does."""
        return self.lmeval_ext_scorer.take()

    def lmeval_ext_report(self) -> dict[str, Any]:
        """Facts about kernels and memory.

        kernels: `layer_kernels` of the model, with lists for tuples. dtype: of the weights that are not quantized.
        kv_pool_bytes: size of the preallocated KV cache. weight_bytes: memory that loading took, None if unknown.
        peak_bytes: most GPU memory allocated since start or `lmeval_ext_reset_peak`, None on a CPU.
        """
        runner, model = self.model_runner, self.lmeval_ext_model()
        # The layers of hybrid models are views of one buffer, so each storage counts once
        pool = {s.data_ptr(): s.nbytes() for s in map(_storage, runners.kv_cache_tensors(runner))}
        return {
            "kernels": {name: list(activations) for name, activations in _kernels(model).items()},
            "dtype": str(runner.model_config.dtype).removeprefix("torch."),
            "kv_pool_bytes": sum(pool.values()),
            "weight_bytes": runners.weight_bytes(runner),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    def lmeval_ext_model(self) -> Any:
        """The model that the worker loaded; not for `collective_rpc`."""
        runner = self.model_runner
        return runner.get_model() if hasattr(runner, "get_model") else runner.model

    def lmeval_ext_reset_peak(self) -> None:
        """Starts the measurement of `peak_bytes` again."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
