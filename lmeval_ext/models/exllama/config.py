"""Reads a checkpoint's config.json and generation_config.json.

Needs no engine. Fields that only ExLlamaV2 has to be given are translated in v2/rope.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    """Returns the model's context in tokens.

    By the rule of the harness' `hf` (lm_eval.models.utils.resolve_max_length).
    """
    text = text_config(config)
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(text.get(key), int):
            return int(text[key])
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**29 else default


def stop_tokens(folder: Path, config: dict[str, Any]) -> list[int]:
    """Returns the end-of-text ids that Transformers' `generate` uses: generation_config.json's, else config.json's."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    if ids is None:
        ids = text_config(config).get("eos_token_id")
    return [int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
