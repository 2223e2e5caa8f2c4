"""Paths in specs: which values are paths and where they lead; and the context length of a checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.run.specs.engines import PATH_ARGUMENTS

# Keys under which a composite config of transformers keeps the language model's config
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def trained_context(pretrained: Any) -> int | None:
    """The max_position_embeddings, in tokens, of a checkpoint folder; None where its config.json has none.

    `lmeval_ext.storage.checkpoint` (`Checkpoint.context_length`) is the other package's own copy of this rule.
    """
    try:
        config = json.loads((Path(pretrained) / "config.json").read_bytes())
        for _ in range(2):  # thinker_config holds a text_config
            config = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
        value = config.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def resolve(
    args: dict[str, Any], folder: Path, names: Sequence[str] = PATH_ARGUMENTS
) -> tuple[dict[str, Any], str | None]:
    """`args` with paths counted from `folder`; and a message about the first path that does not exist, or None."""
    resolved, missing = dict(args), None
    for name in names:
        value = args.get(name)
        if isinstance(value, list):
            parts = [_path(str(item), folder) for item in value]
            resolved[name] = [part for part, _ in parts]
            missing = missing or next((problem for _, problem in parts if problem), None)
        elif isinstance(value, str):
            resolved[name], problem = _path(value, folder)
            missing = missing or problem
    return resolved, missing


def absolute(text: str, folder: Path) -> Path:
    """The path that `text` means, counted from `folder`, whether it exists or not."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # "~" with the name of an unknown user
        path = Path(text)
    # links are not resolved: in the hub's cache, only their names have suffixes
    return Path(os.path.abspath(folder / path))  # noqa: PTH100


def exists(path: Path) -> bool:
    """Whether a path exists; False for text that cannot be a path, such as one too long."""
    try:
        return path.exists()
    except OSError:
        return False


def _path(text: str, folder: Path) -> tuple[str, str | None]:
    """An existing path made absolute, or `text` itself; and a message where `text` cannot be a hub id either."""
    path = absolute(text, folder)
    if exists(path):
        return str(path), None
    looks_local = text.startswith((".", "~", "/")) or text.count("/") > 1 or text.endswith((".gguf", ".safetensors"))
    return (text, f"no such file or folder: {path}") if looks_local else (text, None)
