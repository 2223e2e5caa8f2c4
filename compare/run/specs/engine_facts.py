"""What `compare run` has to know of the harness models that are built on our contract, read without importing them.

The entry-point group `lm_eval.models` names every such model and its class, ours and those of other packages alike.
Its facts are literals in the body of that class (`Observed` in lmeval_ext/models/observed.py declares them); the source
is parsed and never run, so no engine is loaded. A class without `engine_packages` is not one of these models.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "lm_eval.models"


@dataclass(frozen=True)
class EngineFacts:
    """Facts of one harness model; all of them take label=, reference= and save_reference=.

    engine_packages: distributions of the engine, of which the first one installed counts. stock_models: models of the
    harness that this one can replace. context_argument: the argument that sizes the context, if it has to be given.
    needs_tokenizer: whether it needs the data spec's tokenizer as its own tokenizer= argument.
    """

    engine_packages: tuple[str, ...]
    stock_models: tuple[str, ...] = ()
    context_argument: str | None = None
    needs_tokenizer: bool = False


@lru_cache(maxsize=1)
def measured_models() -> dict[str, EngineFacts]:
    """Facts by the name that `lm_eval --model` takes, of all installed models on our contract."""
    facts = {point.name: _facts(point) for point in entry_points(group=GROUP)}
    return {name: known for name, known in facts.items() if known is not None}


def replacement(stock_model: str) -> str | None:
    """The model on our contract that runs what a model of the harness runs; None if there is none."""
    return next((name for name, facts in measured_models().items() if stock_model in facts.stock_models), None)


def _facts(point: EntryPoint) -> EngineFacts | None:
    try:
        file = _source(point.module)
        tree = ast.parse(file.read_bytes()) if file is not None else ast.Module([], [])
        body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == point.attr), [])
        values = dict(_literals(body))
        return EngineFacts(**values) if "engine_packages" in values else None
    except (OSError, SyntaxError, ValueError, ImportError):  # another package's model, which is none of ours
        return None


def _literals(body: list[ast.stmt]) -> list[tuple[str, Any]]:
    """Names and values of the facts among a class's assignments."""
    return [
        (target.id, ast.literal_eval(node.value))
        for node in body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id in EngineFacts.__dataclass_fields__
    ]


def _source(module: str) -> Path | None:
    """The file of a module; its package is located and not imported."""
    top, *below = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not below:
        return Path(spec.origin) if spec.origin else None
    roots = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    files = [file for root in roots for file in (root.with_suffix(".py"), root / "__init__.py")]
    return next((file for file in files if file.is_file()), None)
