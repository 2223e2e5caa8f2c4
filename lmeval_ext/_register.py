"""What the hook does to lm-eval: register our models lazily, index our tasks.

Besides this file, `requests.py` (the scoring method) and `tasks/perplexity.py` (a Task that skips the base class'
constructor) rest on names of the harness that are not public. Tried with lm-eval 0.4.13; `tests/core` fails when one
of them changes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS = Path(__file__).parent / "tasks"

# The same rows as [project.entry-points."lm_eval.models"] in pyproject.toml (a test compares them).
# A table, because scanning installed metadata at every `import lm_eval.models` costs tens of milliseconds.
MODELS = {
    "vllm_nvfp4": "lmeval_ext.models.vllm.adapter:VLLMQuantized",
    "hf_quant": "lmeval_ext.models.hf.adapter:HFQuantized",
    "llamacpp": "lmeval_ext.models.llamacpp.adapter:LlamaCpp",
    "exllamav3": "lmeval_ext.models.exllama.v3.adapter:ExLlamaV3",
    "exl3": "lmeval_ext.models.exllama.v3.adapter:ExLlamaV3",
    "exllamav2": "lmeval_ext.models.exllama.v2.adapter:ExLlamaV2Model",
    "exl2": "lmeval_ext.models.exllama.v2.adapter:ExLlamaV2Model",
}


def register_models(_module: ModuleType) -> None:
    """Register our models, lazily, after the harness registered its own.

    Does nothing where the harness reads entry points itself (`load_plugins`, merged upstream in
    August 2026), and leaves a name alone that the harness already owns.
    """
    from lm_eval.api import registry

    from lmeval_ext import output_guard as results
    from lmeval_ext.errors import install_excepthook

    install_excepthook()
    results.guard()
    if hasattr(registry, "load_plugins"):
        return
    for name, target in MODELS.items():
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=target)


def register_tasks(manager: ModuleType) -> None:
    """Index our task folder wherever the harness indexes its default tasks.

    Our folder goes *before* the harness' own, and later folders win there: a task name that upstream
    or the user's `--include_path` owns stays theirs.
    """
    from lmeval_ext import output_guard as results
    from lmeval_ext.errors import install_excepthook

    install_excepthook()  # a mistake in --output_path shows before any model is loaded
    results.guard()
    index: Any = manager.TaskIndex
    defaults = Path(manager.__file__ or "").parent
    build = index.build

    @functools.wraps(build)
    def build_with_ours(paths: Any, *args: Any, **kwargs: Any) -> Any:
        paths = list(paths)
        if defaults in paths and TASKS not in paths:
            paths.insert(0, TASKS)
        return build(paths, *args, **kwargs)

    index.build = staticmethod(build_with_ours)
