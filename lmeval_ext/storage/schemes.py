"""Scheme names from a checkpoint's quantization config.

One row of `SCHEMES` per `quant_method`: a function from the quantization config to the scheme's name, or to None if the
config does not determine it. The names are those that the format's own users write ("w4a16-g128", "exl3-4.0bpw").

To add a method, add a row here and the rows of its packings in `packings`. A method whose logical shapes do not follow
from its tensors gets a row of `UNSUPPORTED`, its name in comparison tables, and its figures are None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

# One row per method whose logical shapes do not follow from its tensors: `quant_method`, and the family's name.
UNSUPPORTED = {
    "eetq": "EETQ", "higgs": "HIGGS", "spqr": "SpQR", "quark": "Quark", "vqe": "VQ",
}  # fmt: skip

# One row per dtype of an unquantized checkpoint: the dtype of its layers, and the scheme's name.
DENSE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def _group(size: Any) -> str:
    """Return "-g128" for groups of 128 weights, "" where there are no groups."""
    return f"-g{size}" if isinstance(size, int) and size > 0 else ""


def compressed_tensors_scheme(config: Config) -> str | None:
    """Return the schemes of the config groups, joined by "+" in alphabetical order; None without a weight scheme.

    The names follow compressed-tensors' presets (`quantization/quant_scheme.py`), in lower case.
    """
    groups = config.get("config_groups")
    schemes = []
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            name = _group_scheme(group["weights"], group.get("input_activations"))
            if name not in schemes:
                schemes.append(name)
    return "+".join(sorted(schemes)) or None


def _group_scheme(weights: Config, inputs: Any) -> str:
    bits, size = weights.get("num_bits"), weights.get("group_size")
    acts: Config = inputs if isinstance(inputs, dict) else {}
    if weights.get("type") == "float":
        if bits == 4:
            base = "mxfp4" if size == 32 else "nvfp4"
            activations = acts.get("num_bits") if acts else 16
            # "nvfp4" alone means 4-bit activations, as in the preset's name.
            # "mxfp4" alone is gpt-oss' weight-only format, so "mxfp4a4" is spelled out.
            return base if (base, activations) == ("nvfp4", 4) else f"{base}a{activations}"
        if bits == 6:
            return "mxfp6" if size == 32 and acts else "mxfp6a16" if size == 32 else "float6"
        if bits == 8:
            base = "mxfp8" if size == 32 else "fp8"
            if not acts:
                return base + "a16"
            if weights.get("strategy") == "block":
                return base + "-block"
            return base + ("-dynamic" if acts.get("dynamic") is True and base == "fp8" else "")
        return f"float{bits}"
    asymmetric = "-asym" if weights.get("symmetric") is False else ""
    if not acts:
        return f"w{bits}a16{_group(size)}{asymmetric}"
    kind = "fp" if acts.get("type") == "float" else ""
    if bits == acts.get("num_bits") == 8 and not kind:
        return f"w8a8-int8{asymmetric}"
    return f"w{bits}a{kind}{acts.get('num_bits')}{_group(size)}{asymmetric}"


def _bitsandbytes(config: Config) -> str | None:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return "int8"
    kind = config.get("bnb_4bit_quant_type")
    return f"{kind}{'-dq' if config.get('bnb_4bit_use_double_quant') else ''}" if kind else None


def _weight_only(name: str) -> Callable[[Config], str | None]:
    """Return the naming function of a format with integer weights in groups: "awq-w4-g128"."""

    def scheme(config: Config) -> str | None:
        bits = config.get("bits", config.get("w_bit"))
        size = config.get("group_size", config.get("q_group_size"))
        return f"{name}-w{bits}{_group(size)}" if isinstance(bits, int) else None

    return scheme


def _bpw(name: str) -> Callable[[Config], str | None]:
    """Return the naming function of a format with a target bit rate: "exl3-4.0bpw"."""

    def scheme(config: Config) -> str | None:
        bits = config.get("bits")
        if not isinstance(bits, int | float):
            return None
        text = f"{float(bits):.6g}"
        return f"{name}-{text if '.' in text else text + '.0'}bpw"

    return scheme


def _fp8(config: Config) -> str:
    if config.get("weight_block_size"):
        return "fp8-block"
    return "fp8" if config.get("activation_scheme") == "static" else "fp8-dynamic"


# One row per `quant_algo` of ModelOpt: the scheme's name. Others take the algorithm's own name in lower case.
MODELOPT_ALGORITHMS = {
    "NVFP4": "nvfp4", "NVFP4_AWQ": "nvfp4-awq", "W4A16_NVFP4": "nvfp4a16", "NVFP4_SVDQUANT": "nvfp4-svdquant",
    "W4A8_NVFP4_FP8": "nvfp4a8", "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8-dynamic", "FP8_PB_WO": "fp8a16-block",
    "MXFP4": "mxfp4a4", "MXFP8": "mxfp8",
}  # fmt: skip


def _modelopt(config: Config) -> str | None:
    """Name the `quant_algo` of hf_quant_config.json (under "quantization") or of config.json's quantization_config."""
    inner = config.get("quantization")
    algorithm = str((inner if isinstance(inner, dict) else config).get("quant_algo") or "").upper()
    return MODELOPT_ALGORITHMS.get(algorithm, algorithm.lower().replace("_", "-") or compressed_tensors_scheme(config))


def _aqlm(config: Config) -> str | None:
    """Return "aqlm-2x8-g8": codebooks, bits of their codes, weights per code."""
    sizes = [config.get(key) for key in ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")]
    if not all(type(size) is int for size in sizes):
        return None
    height = f"x{sizes[3]}" if sizes[3] != 1 else ""
    return f"aqlm-{sizes[0]}x{sizes[1]}-g{sizes[2]}{height}"


def _vptq(config: Config) -> str | None:
    """Return "vptq-v8-k65536-256": vector length, main and residual centroids; None where layers differ in them."""
    layers = config.get("config_for_layers") or config.get("shared_layer_config") or config
    names = set()
    for layer in layers.values() if isinstance(layers, dict) else ():
        if isinstance(layer, dict) and "vector_lens" in layer:
            pairs = [layer.get(key) for key in ("vector_lens", "num_centroids", "num_res_centroids")]
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                return None
            vector, main, residual = (pair[1] for pair in pairs if pair)
            names.add(f"vptq-v{vector}-k{main}-{max(0, residual)}")
    return names.pop() if len(names) == 1 else None


def _qtip(config: Config) -> str | None:
    """Return "qtip-4bit" or "qtip-2bit-hyb" of the papers: bits per weight, and the codebook."""
    bits, mode = config.get("K"), config.get("decode_mode")
    return f"qtip-{bits}bit-{mode}" if type(bits) is int and isinstance(mode, str) else None


def _any_precision(config: Config) -> str | None:
    """Return "anyprec-4bit", the precision that runs; "anyprec-3to8bit" for a file that holds several."""
    if "precision" in config:
        return f"anyprec-{config['precision']}bit"
    low, high = config.get("seed_precision"), config.get("parent_precision")
    if type(low) is not int or type(high) is not int:
        return None
    return f"anyprec-{high}bit" if low == high else f"anyprec-{low}to{high}bit"


def _hqq(config: Config) -> str | None:
    settings = config.get("quant_config")
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    bits, size = (weights.get("nbits"), weights.get("group_size")) if isinstance(weights, dict) else (None, None)
    return f"hqq-w{bits}{_group(size)}" if isinstance(bits, int) else None


def _quanto(config: Config) -> str | None:
    """Name the types in quanto_qmap.json ("int4", "int8-a8"), or `weights` of a quantization config."""
    modules = config.get("modules")
    if not isinstance(modules, dict):
        weights = config.get("weights")
        return f"quanto-{weights}" if isinstance(weights, str) else None
    names = set()
    for module in modules.values():
        if isinstance(module, dict):
            weights, inputs = str(module.get("weights")).removeprefix("q"), module.get("activations")
            names.add(weights if inputs in (None, "none") else f"{weights}-{str(inputs).removeprefix('q')}")
    return "quanto-" + "+".join(sorted(names)) if names else None


def _torchao(config: Config) -> str | None:
    """Return torchao's own name of the config: "Int8WeightOnly"; None where modules have several."""
    settings = config.get("quant_type")
    entries = settings.values() if isinstance(settings, dict) else ()
    names = {str(entry["_type"]) for entry in entries if isinstance(entry, dict) and "_type" in entry}
    return "torchao-" + names.pop().removesuffix("Config") if len(names) == 1 else None


SCHEMES: dict[str, Callable[[Config], str | None]] = {
    "compressed-tensors": compressed_tensors_scheme,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mxfp8": _modelopt,
    "modelopt_mixed": _modelopt,
    "awq": _weight_only("awq"),
    "gptq": _weight_only("gptq"),
    "auto-round": _weight_only("auto-round"),
    "bitsandbytes": _bitsandbytes,
    "exl2": _bpw("exl2"),
    "exl3": _bpw("exl3"),
    "fp8": _fp8,
    "fbgemm_fp8": lambda config: "fp8-dynamic",
    "mxfp4": lambda config: "mxfp4",
    "mxfp8": lambda config: "mxfp8",
    "aqlm": _aqlm,
    "vptq": _vptq,
    "qtip": _qtip,
    "quip": lambda config: f"quip-{str(config.get('codebook')).lower()}" if config.get("codebook") else None,
    "anyprec": _any_precision,
    "hqq": _hqq,
    "bitnet": lambda config: "bitnet-b1.58",
    "quanto": _quanto,
    "torchao": _torchao,
}
# Former names of methods, as older checkpoints have them.
FORMER_NAMES = {
    "intel/auto-round": "auto-round", "intel/auto_round": "auto-round", "auto_round": "auto-round",
    "autoround": "auto-round", "bnb": "bitsandbytes", "compressed_tensors": "compressed-tensors",
    "sparseml": "compressed-tensors",
}  # fmt: skip


def method_of(config: Config) -> str | None:
    """Return the quantization method that a config names, in lower case; None if it does not name one."""
    method = config.get("quant_method")
    if isinstance(method, str):
        return FORMER_NAMES.get(method.lower(), method.lower())
    inner = config.get("quantization")  # of hf_quant_config.json
    if isinstance(config.get("producer"), dict) or "quant_algo" in (inner if isinstance(inner, dict) else config):
        return "modelopt"
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return None
