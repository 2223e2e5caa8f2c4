"""Quantizes a checkpoint to a compressed-tensors scheme by round-to-nearest, with that package alone.

    python demo/quantize_ct.py MODEL_DIR OUT_DIR --scheme NVFP4A16

SCHEME is one of compressed-tensors' presets (NVFP4A16, NVFP4, FP8_DYNAMIC, W8A8, W4A16, MXFP4A16 ...), optionally
with a suffix for another group size (W4A16_G64) or one scale per output channel (W8A16_CHANNEL). Every Linear but
lm_head is quantized; a model whose layers have other matrices (stacked experts, GPT-2's Conv1D) is refused. A scheme
with static input scales (NVFP4, FP8) needs a calibration text.

The output is what llm-compressor's QuantizationModifier (0.14) writes without an algorithm:

- weight scales from the minimum and maximum of each group, computed in the checkpoint's own dtype, bfloat16 too
  (`llmcompressor/observers/min_max.py`, `compressed_tensors.quantization.utils.calculate_qparams`);
- NVFP4's global scale = 448 * 6 / absmax (`generate_gparam`; 448 and 6 are the largest FP8 E4M3 and FP4 E2M1
  values), where the layers that vLLM runs as one (q/k/v, gate/up) share the absmax of the group
  (`fuse_weight_observers`, `FUSED_LAYER_NAMES` in `llmcompressor/observers/helpers.py`);
- input scales by the same formula from the absmax of each module's own input over all calibration tokens,
  in the unquantized model (observer "static_minmax"; inputs need no fusing: q/k/v read one tensor).
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import torch
from calibrate import input_ranges
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    apply_quantization_config,
    is_preset_scheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized
from outputs import UsageError, checkpoint, new_folder, run
from torch.nn import Module
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

IGNORED = ["lm_head"]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SAMPLE = Path(__file__).resolve().parents[1] / "lmeval_ext" / "tasks" / "sample.txt"
STATES = ("A_log",)  # Mamba's, two-dimensional but never a factor of a matrix product
WEIGHT_STRATEGIES = {"tensor", "channel", "group", "tensor_group"}

Range = tuple[torch.Tensor, torch.Tensor]


def parse_scheme(name: str) -> QuantizationScheme:
    """The preset called `name`, with its weights' group size or strategy replaced by a suffix _G<n> or _CHANNEL."""
    match = re.fullmatch(r"(.+?)(?:_G(\d+)|_(CHANNEL))?", name.upper())
    assert match is not None  # argparse passes no empty string, and .+? takes anything else
    preset, group_size, channel = match.groups()
    if not is_preset_scheme(preset):
        raise UsageError(f"--scheme {name}: no such preset; expected one of {', '.join(PRESET_SCHEMES)}")
    scheme = preset_name_to_scheme(preset, targets=["Linear"])
    if scheme.weights is None:
        raise UsageError(f"--scheme {name} does not quantize weights: choose another")
    if group_size or channel:
        if scheme.weights.strategy not in ("group", "channel"):
            raise UsageError(f"--scheme {name}: {preset}'s group size is fixed; leave the suffix out")
        changes = (
            {"strategy": "group", "group_size": int(group_size)}
            if group_size
            else {"strategy": "channel", "group_size": None}
        )
        weights = type(scheme.weights)(**(scheme.weights.model_dump() | changes))
        scheme = scheme.model_copy(update={"weights": weights})
    if scheme.weights is not None and scheme.weights.strategy not in WEIGHT_STRATEGIES:
        raise UsageError(f"--scheme {name}: weights by {scheme.weights.strategy} are not supported here")
    return scheme


def needs_calibration(scheme: QuantizationScheme) -> bool:
    """Whether any input scale is static (dynamic "local": only the global one is)."""
    return scheme.input_activations is not None and scheme.input_activations.dynamic is not True


def weight_range(weight: torch.Tensor, strategy: str, group_size: int | None) -> Range:
    """Minimum and maximum of each quantization group.

    `weight` is [out, in]; the results are [1] (tensor), [out, 1] (channel) or [out, in / group_size] (groups).
    """
    if strategy == QuantizationStrategy.TENSOR:
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == QuantizationStrategy.CHANNEL:
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    groups = weight.unflatten(-1, (-1, group_size))
    return groups.amin(-1), groups.amax(-1)


def global_scale(weights: list[torch.Tensor]) -> torch.Tensor:
    """NVFP4's second-level scale [1], float32, of weights that share it."""
    absmax = torch.stack([weight.abs().amax() for weight in weights]).amax()
    return generate_gparam(-absmax, absmax)


def weight_partners(model: Module) -> dict[Module, list[Module]]:
    """For each quantized module, those whose weights share its global scale (itself included)."""
    partners = {module: [module] for module in model.modules() if is_module_quantized(module)}
    for parent in model.modules():
        for names in FUSED:
            group = [child for name in names if (child := getattr(parent, name, None)) in partners]
            if len(group) == len(names):
                partners.update(dict.fromkeys(group, group))
    return partners


def set_weight_scales(module: Module, partners: list[Module]) -> None:
    """Fill the weight's quantization parameters, which `apply_quantization_config` made empty."""
    args = module.quantization_scheme.weights
    low, high = weight_range(module.weight.data, args.strategy, args.group_size)
    shared = None
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        shared = global_scale([partner.weight.data for partner in partners])
        module.weight_global_scale.data.copy_(shared)
    scale, zero_point = calculate_qparams(low, high, args, global_scale=shared)
    module.weight_scale.data.copy_(scale)
    if not args.symmetric:
        module.weight_zero_point.data.copy_(zero_point)


def set_input_scales(module: Module, observed: Range) -> None:
    """Fill the static part of the input's quantization parameters from the observed minimum and maximum."""
    args = module.quantization_scheme.input_activations
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        module.input_global_scale.data.copy_(generate_gparam(*observed))
        return
    scale, zero_point = calculate_qparams(*(bound.reshape(1) for bound in observed), args)
    module.input_scale.data.copy_(scale)
    if not args.symmetric:
        module.input_zero_point.data.copy_(zero_point)


def check_layers(model: Module, name: str) -> None:
    """UsageError if layers have matrices that are not a Linear's, which would stay unquantized.

    name: of the model, for the message. Embeddings and convolutions are not counted, nor are the states of Mamba.
    """
    left_out = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    others = [
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        if not isinstance(module, left_out)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and parameter not in STATES
    ]
    if others:
        raise UsageError(
            f"{name}: {len(others)} matrices are not those of a Linear layer and would stay unquantized ({others[0]}, "
            "…); quantize this architecture with llm-compressor"
        )


def check_widths(model: Module, group_size: int | None) -> None:
    """UsageError unless the group size divides the input width of every Linear."""
    for name, module in model.named_modules():
        if group_size and isinstance(module, torch.nn.Linear) and name not in IGNORED:
            width = module.in_features
            if width % group_size:
                raise UsageError(
                    f"--scheme: group size {group_size} does not divide {name}'s width {width}; "
                    "choose another group size (suffix _G<n>) or a model whose widths it divides"
                )


def quantize(model: PreTrainedModel, scheme: QuantizationScheme, observed: dict[str, Range]) -> ModelCompressor:
    """Compress `model` in place; `observed` holds input ranges by module name, if the scheme needs them."""
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORED)
    apply_quantization_config(model, config)
    partners = weight_partners(model)
    quantized = {name: module for name, module in model.named_modules() if module in partners}
    for name, module in tqdm(quantized.items(), desc="scales", unit="layer"):
        set_weight_scales(module, partners[module])
        if needs_calibration(scheme):
            set_input_scales(module, observed[name])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def copy_settings(source: Path, folder: Path) -> None:
    """Copy the source's configuration, tokenizer and chat template, over what `save_pretrained` rewrote.

    Transformers 5 drops settings that it does not know when it writes config.json: a top-level `rope_theta`,
    for example, without which some engines silently take another value.
    """
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of the unquantized checkpoint")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write (must not exist)")
    parser.add_argument("--scheme", required=True, metavar="SCHEME", help="for example NVFP4A16 or W4A16_G64")
    parser.add_argument(
        "--calibration",
        type=Path,
        default=SAMPLE,
        metavar="TEXT",
        help="text to observe inputs on (default: the sample)",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=16 * 512, metavar="N", help="in sequences of 512 (default: 8192)"
    )
    options = parser.parse_args()

    source, scheme = checkpoint(options.model_dir), parse_scheme(options.scheme)
    with new_folder(options.out_dir) as folder:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        check_layers(model, str(source))
        check_widths(model, scheme.weights.group_size if scheme.weights else None)
        observed: dict[str, Range] = {}
        if needs_calibration(scheme):
            tokenizer = AutoTokenizer.from_pretrained(source)
            observed = input_ranges(model, tokenizer, options.calibration, options.calibration_tokens)
        compressor = quantize(model, scheme, observed)
        model.save_pretrained(folder)
        copy_settings(source, folder)
        compressor.update_config(str(folder))
    print(options.out_dir)


if __name__ == "__main__":
    run(main)
