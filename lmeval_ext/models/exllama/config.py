"""Reads a checkpoint's config.json and generation_config.json.

Needs no engine. Fields that only ExLlamaV2 has to be given are translated in v2/rope.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.models.utils import resolve_max_length

from lmeval_ext.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file cannot be read or holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    return value


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the language model's part of a config.json, completed by the fields of the outer level."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def context_length(config: dict[str, Any], tokenizer: Any = None, default: int = 2048) -> int:
    """Returns the model's context in tokens, by the rule of the harness' `hf`."""
    numbers = {key: value for key, value in text_config(config).items() if isinstance(value, int)}
    return int(resolve_max_length(SimpleNamespace(**numbers), tokenizer, default=default))


def stop_tokens(folder: Path, config: dict[str, Any]) -> list[int]:
    """Returns the end-of-text ids that Transformers' `generate` uses: generation_config.json's, else config.json's."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    if ids is None:
        ids = text_config(config).get("eos_token_id")
    return [int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
