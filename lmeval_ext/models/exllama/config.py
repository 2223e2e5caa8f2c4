"""What ExLlamaV2 and V3 must be told of a checkpoint that its config.json says in words they do not read.

Needs no engine: plain config.json in, plain figures out. Tried with exllamav2 0.3.2 and exllamav3 1.6.5.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.loading import local_checkpoint

_NO_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.msgpack", "*.h5"]  # what neither engine reads


def find_checkpoint(pretrained: str, revision: str | None = None) -> Path:
    """The checkpoint's folder: itself, or the hub's snapshot, fetched if need be. UserError if there is none."""
    found = local_checkpoint(pretrained, revision)
    if found is None:
        try:
            from huggingface_hub import snapshot_download

            found = str(snapshot_download(pretrained, revision=revision, ignore_patterns=_NO_WEIGHTS))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"pretrained={pretrained!r}: no such folder, and no model of the hub that can be reached ({reason[0]})"
            ) from error
    folder = Path(found)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise UserError(f"pretrained={pretrained!r}: no config.json there; give a folder with safetensors weights")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError if it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is no JSON object; download it again")
    return value


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json; what only the whole says is added."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def context_length(config: dict[str, Any], tokenizer: Any = None, default: int = 2048) -> int:
    """The model's context in tokens, by the rule of the harness' `hf` (lm_eval.models.utils.resolve_max_length)."""
    text = text_config(config)
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(text.get(key), int):
            return int(text[key])
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**29 else default


def stop_tokens(folder: Path, config: dict[str, Any]) -> list[int]:
    """End-of-text ids as Transformers' `generate` takes them: generation_config.json's, else config.json's."""
    file = folder / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    if found is None:
        found = text_config(config).get("eos_token_id")
    return [int(i) for i in (found if isinstance(found, list) else [found]) if i is not None]


def numbers(name: str, value: Any) -> list[float] | None:
    """`gpu_split=20/24`, `[20, 24]`, "20,24" or 20 as a list of figures; None stays None.

    (A comma would end the argument in --model_args, so `/`, `+` and `:` do as well.)
    """
    if value is None or value == "auto":
        return None
    parts = value if isinstance(value, list | tuple) else re.split(r"[,/+:\s]+", str(value))
    try:
        return [float(p) for p in parts]
    except ValueError:
        raise UserError(f"{name}={value!r}: expected figures such as 20/24") from None


def cache_bits(value: Any, allowed: tuple[int, ...]) -> tuple[int, int] | None:
    """Bits of keys and values in the KV cache: 4, "q4", "8/4" (keys/values); None for fp16. UserError for others."""
    if value is None or str(value).lower() in ("", "16", "fp16", "float16", "none"):
        return None
    parts = value if isinstance(value, list | tuple) else re.split(r"[,/+:\s]+", str(value))
    bits = [str(p).lower().removeprefix("q") for p in parts]
    if len(bits) not in (1, 2) or any(not b.isdigit() or int(b) not in allowed for b in bits):
        raise UserError(
            f"cache_bits={value!r}: expected {', '.join(map(str, allowed))} or fp16 (keys and values apart: 8/4)"
        )
    return int(bits[0]), int(bits[-1])
