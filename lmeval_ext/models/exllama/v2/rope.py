"""Translates the rotary embeddings of a config.json into fields of ExLlamaV2's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.config import text_config


@dataclass
class Rope:
    """Rotary embeddings as config.json has them. kind: "default", "linear", "llama3", "yarn", "longrope", …"""

    theta: float | None = None
    kind: str = "default"
    partial: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


def read_rope(config: dict[str, Any]) -> Rope:
    """Reads the fields of Transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    Raises UserError if layers have different ones.
    """
    text = text_config(config)
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json: rope_parameters is {type(scaling).__name__}, expected an object")
    if any(isinstance(v, dict) for v in scaling.values()):
        raise UserError("config.json: rope_parameters differ by layer type, which ExLlamaV2 does not support")
    theta = scaling.get("rope_theta", text.get("rope_theta"))
    partial = scaling.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    original = text.get("original_max_position_embeddings")
    if original is not None:
        scaling = {"original_max_position_embeddings": original, **scaling}
    return Rope(None if theta is None else float(theta), kind, None if partial is None else float(partial), scaling)


# For each kind of scaling that ExLlamaV2 computes: the method's name there, and which attribute of ExLlamaV2Config has
# which field of config.json (exllamav2/config.py, exllamav2/rope.py).
_SCALING: dict[str, tuple[str | None, dict[str, str]]] = {
    "default": (None, {}),
    "linear": (None, {"scale_pos_emb": "factor"}),
    "llama3": (
        "llama3",
        {
            "l3_rope_factor": "factor",
            "l3_rope_low_freq_factor": "low_freq_factor",
            "l3_rope_high_freq_factor": "high_freq_factor",
            "l3_rope_original_max_position_embeddings": "original_max_position_embeddings",
        },
    ),
    "longrope": (
        "su",
        {
            "scale_long_factor": "long_factor",
            "scale_short_factor": "short_factor",
            "original_max_seq_len": "original_max_position_embeddings",
        },
    ),
}
_SCALING["su"] = _SCALING["longrope"]


def set_rope(v2: Any, config: dict[str, Any], where: str) -> None:
    """Sets rotary embeddings on an `ExLlamaV2Config` after `prepare()`, which reads only top-level fields.

    Without this, a config.json of Transformers 5 silently means a base of 10000 (perplexity 1228 instead of 25).
    where: the checkpoint, for messages. Raises UserError for scalings that ExLlamaV2 does not have, or computes
    differently from Transformers (YaRN: it starts from the whole context, not from the original one).
    """
    try:
        rope = read_rope(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    scaling = _SCALING.get(rope.kind)
    if scaling is None:
        raise UserError(
            f"{where}: config.json asks for rotary embeddings of the kind {rope.kind!r}, ExLlamaV2 computes "
            f"{', '.join(sorted(_SCALING))} as Transformers does; use the EXL3 version of this model"
        )
    method, fields = scaling
    missing = [name for name in fields.values() if rope.parameters.get(name) is None]
    if missing:
        raise UserError(f"{where}: config.json has no {missing[0]} for its {rope.kind} rotary embeddings")
    if rope.theta is not None:
        v2.rotary_embedding_base = rope.theta
    if rope.partial is not None:
        v2.partial_rotary_factor = rope.partial
    if method is not None:
        v2.alt_rope_method = method
    for attribute, name in fields.items():
        setattr(v2, attribute, rope.parameters[name])
