"""The steps that the hook adds to lm-eval: register models lazily, index our tasks.

Besides this file, `models/harness_models.py` (the scoring method) and `tasks/perplexity.py` (a Task that skips the base
class's constructor) rely on names of the harness that are not public. Tested with lm-eval 0.4.13; `tests/core` fails
when one of them changes. Leaving unused tasks out of the index wraps the public `EvaluatorConfig.process_tasks`.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS = Path(__file__).parent / "tasks"

# Versions of the harness that have no task or tag of a name of ours (tests/core): their own tasks need not be read to
# know whose name it is
WITHOUT_OUR_NAMES = frozenset({"0.4.13"})

# The same rows as [project.entry-points."lm_eval.models"] in pyproject.toml (a test compares them). A table, because
# scanning installed metadata at every `import lm_eval.models` costs tens of milliseconds.
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
    """Registers our models, lazily, after the harness has registered its own.

    Models of other packages in the entry-point group `lm_eval.models` are registered when a name is asked for that
    nobody knows. A name that the harness owns stays its own. Where the harness reads entry points itself
    (`load_plugins`, merged upstream in August 2026), no model is registered here.
    """
    from lm_eval.api import registry

    from lmeval_ext import output_guard
    from lmeval_ext.errors import install_excepthook

    install_excepthook()
    output_guard.guard()
    if hasattr(registry, "load_plugins"):
        return
    models: Any = registry.model_registry
    for name, target in MODELS.items():
        if name not in models:
            models.register(name, target=target)
    get = models.get

    @functools.wraps(get)
    def get_installed(alias: str, *default: Any, **keywords: Any) -> Any:
        if alias not in models:
            for point in entry_points(group="lm_eval.models"):
                if point.name not in models:
                    models.register(point.name, target=point.value)
        return get(alias, *default, **keywords)

    models.get = get_installed


def register_tasks(manager: ModuleType) -> None:
    """Indexes our task folder wherever the harness indexes its default tasks.

    Our folder goes *before* the harness' own, and later folders win there: a task name that upstream or the user's
    `--include_path` owns stays theirs. A command line that asks for our tasks alone does not index the harness' own,
    of which there are 14,683 (seconds).
    """
    from lmeval_ext import output_guard
    from lmeval_ext.errors import install_excepthook

    install_excepthook()  # here too: a mistake in --output_path is reported before any model is loaded
    output_guard.guard()
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
    _leave_out_unused(manager, defaults)


def _leave_out_unused(manager: ModuleType, defaults: Path) -> None:
    """Leaves the harness' own tasks out of the index of a command line that names none of them."""
    from importlib.metadata import version

    from lm_eval.config.evaluate_config import EvaluatorConfig

    if version("lm_eval") not in WITHOUT_OUR_NAMES:
        return
    config: Any = EvaluatorConfig
    index: Any = manager.TaskIndex
    process_tasks = config.process_tasks

    @functools.wraps(process_tasks)
    def process_tasks_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.tasks if isinstance(self.tasks, list) else [self.tasks]
        names = {name for task in asked for name in str(task).split(",")}
        if not names <= our_names():
            return process_tasks(self, *args, **kwargs)
        build = index.build

        def build_ours(paths: Any, *args: Any, **kwargs: Any) -> Any:
            return build([TASKS if path == defaults else path for path in paths], *args, **kwargs)

        index.build = staticmethod(build_ours)
        try:
            return process_tasks(self, *args, **kwargs)
        finally:
            index.build = staticmethod(build)

    config.process_tasks = process_tasks_alone


def our_names() -> frozenset[str]:
    """The names in our task folder that `--tasks` takes: tasks, each in a file of its name, and tags."""
    files = list(TASKS.glob("*.yaml"))
    tags = (line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("tag:"))
    return frozenset({file.stem for file in files} | {tag.removeprefix("tag:").strip() for tag in tags})
