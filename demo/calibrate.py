"""Observes the range of input values of each Linear on a text."""

from __future__ import annotations

from pathlib import Path

import torch
from outputs import UsageError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCE = 512  # tokens; llm-compressor's default is 384, its NVFP4 examples take 2048


def sequences(tokenizer: PreTrainedTokenizerBase, text: Path, tokens: int) -> Tensor:
    """Returns the first `tokens` of the text in rows of SEQUENCE tokens: int64 [tokens // SEQUENCE, SEQUENCE]."""
    if not text.is_file():
        raise UsageError(f"--calibration {text}: no such file; expected a UTF-8 text")
    if tokens < SEQUENCE:
        raise UsageError(f"--calibration-tokens {tokens}: expected at least {SEQUENCE}")
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
    rows = tokens // SEQUENCE
    if len(ids) < rows * SEQUENCE:
        raise UsageError(
            f"--calibration {text} has {len(ids)} tokens, fewer than the requested {rows * SEQUENCE}: "
            "lower --calibration-tokens or give a longer text"
        )
    return torch.tensor(ids[: rows * SEQUENCE]).view(rows, SEQUENCE)


@torch.no_grad()
def input_ranges(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path, tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the smallest and largest input value of every Linear over all tokens, by module name."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, value: Tensor) -> None:
        low, high = value.amin(), value.amax()
        if name in ranges:
            low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
        ranges[name] = low, high

    hooks = [
        module.register_forward_pre_hook(lambda _module, inputs, name=name: observe(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        for row in tqdm(sequences(tokenizer, text, tokens), desc="calibration", unit="sequence"):
            model(row.unsqueeze(0), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges
