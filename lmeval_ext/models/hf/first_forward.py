"""One short forward after loading, which shows what the model does with its config: attention, logits, dtypes.

What Transformers leaves out without a word is repaired here, or refused with one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.models.hf.attention import ARGUMENTS, AttentionCalls, recorded_calls
from lmeval_ext.models.hf.logit_settings import LogitSettings, fitted, ignored, replaced_products

# Read as text, so that any tokenizer gives some ids of its own vocabulary
PROBE = "The first forward shows what a model computes."
_TOKENS = 8


@dataclass
class FirstForward:
    """What the first forward showed.

    settings: what the model does to its output matrix' products; None if that is not known. notes: for the result.
    """

    settings: LogitSettings | None
    notes: list[str]


def first_forward(
    model: Any, ids: Sequence[int], name: str, attention: str | None = None, seq2seq: bool = False
) -> FirstForward:
    """Runs a forward over the first ids, and makes the model apply what its config says.

    name: of the checkpoint, for messages. attention: attn_implementation= as the user gave it. Raises UserError if the
    forward fails, or if Transformers' model does not apply what config.json asks for.
    """
    tokens = torch.tensor([list(ids)[:_TOKENS]], device=model.device)
    notes: list[str] = []
    calls, settings = _run(model, tokens, seq2seq, name)
    if calls.dropped and attention is None and hasattr(model, "set_attn_implementation"):
        what = _all(ARGUMENTS[argument] for argument in sorted(calls.dropped))
        notes.append(f"attention is eager, because Transformers' default implementation leaves out {what}")
        model.set_attn_implementation("eager")
        calls, settings = _run(model, tokens, seq2seq, name)
    if calls.dropped:
        what = _all(ARGUMENTS[argument] for argument in sorted(calls.dropped))
        raise UserError(
            f"attn_implementation={attention or 'default'} leaves out {what}, which {name} asks for; use "
            "attn_implementation=eager"
        )
    if wrong := calls.wrong(model.config):
        raise UserError(f"attn_implementation={attention} gets {wrong} of {name} wrong in Transformers; leave it out")
    left_out = calls.never_passed(model.config) | (ignored(settings, model.config) if settings else {})
    if left_out:
        fields = _all(f"{key}={value}" for key, value in left_out.items())
        raise UserError(
            f"{name}: its config.json sets {fields}, which {type(model).__name__} of this Transformers never applies, "
            "so its probabilities would be wrong; run it with vllm_nvfp4 or llamacpp"
        )
    return FirstForward(settings, notes)


def _run(model: Any, tokens: torch.Tensor, seq2seq: bool, name: str) -> tuple[AttentionCalls, LogitSettings | None]:
    """The attention calls of a forward over tokens [1, positions], and the settings that it shows."""
    layer = model.get_output_embeddings()
    more = {"decoder_input_ids": tokens} if seq2seq else {}
    for replacing in (True, False) if layer is not None else (False,):
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                calls = stack.enter_context(recorded_calls(model))
                replaced = stack.enter_context(replaced_products(layer)) if replacing else None
                logits = model(input_ids=tokens, use_cache=False, **more).logits
            return calls, fitted(replaced.numbers, logits, model.config) if replaced else None
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not replacing:
                raise UserError(
                    f"{name} is loaded, but its first forward fails ({type(error).__name__}: {first_line(error)}); "
                    "LMEVAL_EXT_TRACEBACK=1 shows where"
                ) from error
    raise AssertionError


def _all(parts: Any) -> str:
    return " and ".join(parts)
