"""When vLLM's engine starts, and whether it compiles its model.

torch.compile and the capture of CUDA graphs take one to two minutes on a GPU. They pay where text is generated token by
token; prompts that are only scored gain nothing from them. So the engine starts at the first request: eager for
log-probabilities, compiled for text. A run that asks for both gets one engine after the other, so that no score depends
on the other tasks of its run. If the user decides about compiling, one engine starts at once and serves everything.

The harness' `VLLM.__init__` (lm-eval 0.4.13) calls the `LLM` of its own module and reads `llm_engine.model_config` of
the result; tests/models/vllm/test_execution.py fails when that changes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

EAGER, COMPILED = "eager", "compiled"

# Arguments of vLLM (0.26 to 0.33) that decide about compiling
_DECISIONS = (
    "enforce_eager", "compilation_config", "optimization_level", "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
)  # fmt: skip
# `LLM` takes or converts these itself; they are no part of the model's configuration
_NOT_OF_THE_MODEL = {
    "chat_template", "compilation_config", "structured_outputs_config", "profiler_config", "kv_transfer_config",
}  # fmt: skip


def user_decides(arguments: Mapping[str, Any]) -> bool:
    """Whether the user's arguments say if the model is compiled."""
    return any(arguments.get(name) is not None for name in _DECISIONS)


def execution_of(vllm_config: Any) -> str | None:
    """`EAGER` or `COMPILED`, from the configuration of a running engine; None if this vLLM spells it differently.

    Compiled is any of torch.compile and graph capture.
    """
    if vllm_config.model_config.enforce_eager:
        return EAGER
    compilation = vllm_config.compilation_config
    mode, graphs = getattr(compilation, "mode", None), getattr(compilation, "cudagraph_mode", None)
    if mode is None or graphs is None:
        return None
    return EAGER if int(mode) == 0 and getattr(graphs, "name", None) == "NONE" else COMPILED


def model_config(arguments: Mapping[str, Any]) -> Any:
    """vLLM's configuration of the model that an engine with these arguments would run; starts no engine."""
    import vllm

    of_the_model = {k: v for k, v in arguments.items() if k not in _NOT_OF_THE_MODEL}
    return vllm.EngineArgs(**of_the_model).create_model_config()


class LateLLM:
    """Stands for vLLM's `LLM` before the first request, and between two engines.

    llm: the class. config: `model_config` of the arguments, which is known without an engine. Any other attribute
    belongs to the running engine; if there is none, `start_default` is called, which calls `start`.
    """

    def __init__(
        self, llm: Callable[..., Any], arguments: dict[str, Any], config: Any, start_default: Callable[[], Any]
    ) -> None:
        self._class, self._arguments, self._config, self._start_default = llm, arguments, config, start_default
        self._llm: Any = None

    @property
    def llm_engine(self) -> Any:
        """vLLM's engine; before it has started, an object with the `model_config` alone."""
        return SimpleNamespace(model_config=self._config) if self._llm is None else self._llm.llm_engine

    def start(self, enforce_eager: bool) -> None:
        """Starts an engine. There is none at the time."""
        self._llm = self._class(**{**self._arguments, "enforce_eager": enforce_eager})

    def stop(self) -> None:
        """Stops the engine and releases its memory. Idempotent; nothing else may hold a reference to it."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()  # engine, runner and model refer to each other
        cleanup_dist_env_and_memory()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._llm is None:
            self._start_default()
        return getattr(self._llm, name)


@contextlib.contextmanager
def replacing_llm(make: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, the harness' `VLLM` gets `make(LLM, arguments)` where it would call `LLM(**arguments)`."""
    from lm_eval.models import vllm_causallms

    original = vllm_causallms.LLM
    vllm_causallms.LLM = lambda **arguments: make(original, arguments)
    try:
        yield
    finally:
        vllm_causallms.LLM = original
