"""An ExLlamaV3 configuration and cache for a checkpoint.

Imports the engine only inside functions, once its adapter has checked that it works.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.loading import Package

PACKAGE = Package(
    "exllamav3",
    extra="exl3",
    compute_capability=(7, 5),
    width_multiple=128,
    load_hints=(
        (
            ("quantized cache must be", "cache size must be", "multiple of 256"),
            "cache_bits is 2 to 8, cache_tokens a multiple of 256",
        ),
    ),
)
CACHE_BITS = tuple(range(2, 9))


def version() -> str:
    """Returns the package's version, also where it is unpacked and not installed."""
    import exllamav3

    try:
        return metadata.version("exllamav3")
    except metadata.PackageNotFoundError:
        return str(getattr(exllamav3, "__version__", "unknown"))


def model_config(folder: Path, override_tensors: Any = None) -> Any:
    """Returns the `Config` of a checkpoint.

    override_tensors: YAML files with tensors to take from other checkpoints, as for ExLlamaV3's `-or FILE.yaml`, which
    hold sources (id, model_dir) and overrides (key, source). Raises UserError if one cannot be read.
    """
    from exllamav3 import Config

    config = Config.from_directory(str(folder))
    if override_tensors:
        files = override_tensors if isinstance(override_tensors, list | tuple) else [override_tensors]
        config.stc = _with_overrides(config.stc, files)
    return config


def _with_overrides(tensors: Any, files: list[Any] | tuple[Any, ...]) -> Any:
    import yaml
    from exllamav3.loader import SafetensorsCollection, VariantSafetensorsCollection

    variants = VariantSafetensorsCollection(tensors)
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            sources = {source["id"]: source["model_dir"] for source in content["sources"]}
            rows = [(row["key"], sources[row["source"]]) for row in content["overrides"]]
        except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(
                f"override_tensors={file!r} cannot be read ({type(error).__name__}: {error}); expected YAML with "
                "sources (id, model_dir) and overrides (key, source)"
            ) from error
        for folder in dict.fromkeys(folder for _, folder in rows):
            variants.add_stc([key for key, source in rows if source == folder], SafetensorsCollection(folder))
    return variants


def new_cache(model: Any, tokens: int, bits: tuple[int, int] | None) -> Any:
    """Returns the KV cache, None for 0 tokens. bits: of keys and values; None: float16.

    It is made before the model is loaded, which allocates it layer by layer.
    """
    from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant

    if tokens == 0:
        return None
    if bits is None:
        return Cache(model, max_num_tokens=tokens, layer_type=CacheLayer_fp16)
    keys, values = bits
    return Cache(model, max_num_tokens=tokens, layer_type=CacheLayer_quant, k_bits=keys, v_bits=values)


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of a cache's layers; 0 for None."""
    return 0 if cache is None else sum(int(layer.storage_size()) for layer in cache.layers.values())
