"""The unmodified harness knows our models and tasks, at no cost to anyone else."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmeval_ext import _register
from lmeval_ext._register import MODELS, WITHOUT_OUR_NAMES, our_names
from lmeval_ext._register import TASKS as OUR_TASKS
from lmeval_ext.errors import MissingEngineError
from tests.conftest import ROOT, run

TASKS = {"wiki2_strided", "wiki2_llamacpp", "wiki2_gptq", "wiki2_sliding", "sample_strided"}


def python(code: str, **env: str) -> str:
    done = run("python", "-c", code, env=env)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_models_are_registered_beside_the_built_in_ones() -> None:
    code = """
import json, lm_eval.models
from lm_eval.api.registry import model_registry as r
print(json.dumps({"all": list(r), "built_in": list(lm_eval.models.MODEL_MAPPING)}))"""
    names = json.loads(python(code))
    assert set(MODELS) <= set(names["all"])
    assert set(names["built_in"]) <= set(names["all"])
    disabled = json.loads(python(code, LMEVAL_EXT_DISABLE="1"))
    assert set(disabled["all"]) == set(disabled["built_in"])


def test_a_name_that_upstream_owns_stays_upstreams() -> None:
    code = """
import lm_eval.api.registry as registry
import lmeval_ext._register as ours, lm_eval.models
before = dict(registry.model_registry._objs)
ours.MODELS["hf"] = "nowhere:Nothing"
ours.register_models(lm_eval.models)
print(registry.model_registry._objs == before)"""
    assert python(code).strip() == "True"


def test_newer_harness_reads_entry_points_itself() -> None:
    """`load_plugins` is upstream's own discovery: where it exists, our hook registers nothing."""
    code = """
import lm_eval.api.registry as registry
registry.load_plugins = lambda *a: []
import lm_eval.models
print([n for n in ("vllm_nvfp4", "hf_quant", "llamacpp") if n in registry.model_registry])"""
    assert python(code).strip() == "[]"


def test_table_and_entry_points_agree() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == MODELS


def test_targets_exist() -> None:
    for target in MODELS.values():
        module, name = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.slow
def test_stock_command_lists_our_tasks_and_keeps_its_own() -> None:
    done = run("lm_eval", "ls", "tasks")
    assert done.returncode == 0, done.stderr
    listed = {cell.strip() for line in done.stdout.splitlines() for cell in line.split("|")}
    assert listed >= TASKS
    assert {"hellaswag", "mmlu", "wikitext"} <= listed


@pytest.fixture
def manager() -> ModuleType:
    """The harness' task manager as this process has it, with our hook."""
    import lm_eval.tasks.manager

    return lm_eval.tasks.manager


@pytest.fixture
def folders_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were indexed since. Of each, only the files at its top are: not the harness' 14,000."""
    import lm_eval.tasks._index

    read: list[Path] = []

    def files_of(root: Path) -> list[Path]:
        read.append(root)
        return sorted(root.glob("*.yaml"))

    monkeypatch.setattr(lm_eval.tasks._index.TaskIndex, "_iter_yaml_files", staticmethod(files_of))
    return read


def index_of(tasks: list[str], include: Path | None = None) -> Any:
    """The index of tasks that a command line makes: `--tasks` and `--include_path`."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig(tasks=tasks, include_path=None if include is None else str(include))
    index = config.process_tasks({}).task_index
    assert config.tasks
    return index


def test_task_precedence(tmp_path: Path, manager: Any) -> None:
    """A task of ours never replaces one of the harness, nor one of the user's folder."""
    theirs = tmp_path / "mine.yaml"
    theirs.write_text("task: sample_strided\noutput_type: generate_until\n")
    index = manager.TaskIndex.build([Path(manager.__file__).parent / "wikitext", tmp_path])
    assert index["sample_strided"].yaml_path == theirs


@pytest.mark.usefixtures("folders_read")
def test_tasks_are_indexed_with_the_default_folder(manager: Any) -> None:
    assert set(manager.TaskIndex.build([Path(manager.__file__).parent])) >= TASKS


@pytest.mark.parametrize(
    "tasks", [["wiki2_strided"], ["wiki2_strided,sample_strided"], ["wiki2_perplexity", "text_strided"]]
)
def test_command_line_with_our_tasks_alone_leaves_the_harness_tasks_unread(
    tasks: list[str], manager: Any, folders_read: list[Path]
) -> None:
    index = index_of(tasks)
    assert Path(manager.__file__).parent not in folders_read
    assert index["sample_strided"].yaml_path == OUR_TASKS / "sample_strided.yaml"


@pytest.mark.parametrize("tasks", [["wiki2_strided", "hellaswag"], ["wiki2_*"], ["wiki2_strided,wiki2_strode"]])
def test_any_other_name_has_the_harness_tasks_read(
    tasks: list[str], tmp_path: Path, manager: Any, folders_read: list[Path]
) -> None:
    """hellaswag and wiki2_strode are found in the user's folder."""
    for name in ("hellaswag", "wiki2_strode"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\noutput_type: generate_until\n")
    index_of(tasks, tmp_path)
    assert Path(manager.__file__).parent in folders_read


def test_users_folder_replaces_our_task_on_the_command_line(
    tmp_path: Path, manager: Any, folders_read: list[Path]
) -> None:
    (tmp_path / "mine.yaml").write_text("task: sample_strided\noutput_type: generate_until\n")
    assert index_of(["sample_strided"], tmp_path)["sample_strided"].yaml_path == tmp_path / "mine.yaml"
    assert Path(manager.__file__).parent not in folders_read


@pytest.mark.parametrize("known", [True, False])
def test_only_a_known_version_of_the_harness_leaves_its_tasks_unread(
    known: bool, manager: Any, folders_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another version may have names of ours, which then stay its own."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    unhooked = EvaluatorConfig.process_tasks.__wrapped__
    monkeypatch.setattr(EvaluatorConfig, "process_tasks", unhooked)
    monkeypatch.setattr(_register, "WITHOUT_OUR_NAMES", WITHOUT_OUR_NAMES if known else frozenset())
    _register.register_tasks(manager)
    index_of(["wiki2_strided"])
    assert (Path(manager.__file__).parent in folders_read) is not known


def test_names_of_ours_are_tasks_and_tags_of_our_files() -> None:
    more = {"text_strided", "long_strided", "wiki2_perplexity", "own_answers", "own_answers_greedy", "domains_text"}
    names = ("prose", "german", "chinese", "japanese", "mathematics", "python", "c", "chat")
    domains = {f"domain_{name}" for name in names}
    assert our_names() == TASKS | more | domains | {"domains"}
    for file in OUR_TASKS.glob("*.yaml"):
        assert file.read_text().startswith(f"{'group' if file.stem == 'domains' else 'task'}: {file.stem}\n")


@pytest.mark.slow
def test_installed_harness_has_no_task_of_our_names() -> None:
    """Where this fails, take the version out of `WITHOUT_OUR_NAMES`; for a new version, add it."""
    import importlib.metadata
    import importlib.util

    assert importlib.metadata.version("lm_eval") in WITHOUT_OUR_NAMES
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    files = list((Path(spec.origin).parent / "tasks").rglob("*.yaml"))
    assert len(files) > 5000
    name = re.compile(rb"\b(" + "|".join(sorted(our_names())).encode() + rb")\b")
    assert [file for file in files if name.search(file.read_bytes())] == []


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys, lm_eval, lm_eval.models
print([m for m in ("torch", "transformers", "vllm", "llama_cpp", "matplotlib", "pandas") if m in sys.modules])"""
    with_hook, without = python(code), python(code, LMEVAL_EXT_DISABLE="1")
    assert with_hook == without


def test_start_of_python_imports_nothing_of_ours() -> None:
    code = """
import sys
print([m for m in sys.modules if m.startswith(("lmeval_ext", "lm_eval", "importlib.meta"))])
print([f.__name__ for f in sys.meta_path if isinstance(f, type)].count("LmevalExtFinder"))"""
    assert python(code).split() == ["[]", "1"]


def test_without_an_installed_package_the_hook_can_be_put_in_by_hand() -> None:
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "LmevalExtFinder"]
sys.path.insert(0, {str(ROOT)!r})
import lmeval_ext._hook as hook
hook.install(); hook.install()
print(sum(getattr(f, "__name__", "") == "LmevalExtFinder" for f in sys.meta_path))
import lm_eval.models
from lm_eval.api.registry import model_registry
print("vllm_nvfp4" in model_registry)"""
    assert python(code).split() == ["1", "True"]


def test_error_of_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingEngineError, match=re.escape("pip install 'lmeval-ext[gguf]'")):
        runpy.run_path(str(ROOT / "lmeval_ext" / "models" / "llamacpp" / "binding.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "module", "words"),
    [
        ("vllm_nvfp4", "vllm", "lmeval-ext[vllm]"),
        ("llamacpp", "llama_cpp", "lmeval-ext[gguf]"),
        ("hf_quant", "accelerate", "lmeval-ext[quant]"),
    ],
)
def test_missing_engine_is_one_line(tmp_path: Path, model: str, module: str, words: str) -> None:
    """A module of the engine's name that fails to import stands for an engine that is not installed."""
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')")
    arguments = ["run", "--model", model, "--model_args", "pretrained=x", "--tasks", "sample_strided"]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.argv = ["lm_eval", *{arguments!r}]
import lm_eval.tasks._index as index
index.TaskIndex._iter_yaml_files = staticmethod(lambda root: sorted(root.glob("sample*.yaml")))  # not 14,000 files
from lm_eval.__main__ import cli_evaluate
cli_evaluate()"""
    done = run("python", "-c", code)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lmeval-ext: error:")
    assert words in last


def test_errors_of_others_keep_their_traceback() -> None:
    done = run("python", "-c", "import lm_eval.models; raise ValueError('not ours')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
