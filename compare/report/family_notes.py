"""What a reader should know of each family before comparing its numbers with another's; one row per family."""

from __future__ import annotations

FAMILY_NOTES: dict[str, str] = {
    "EXL3": "ExLlamaV3's trellis-coded weights (after QTIP), any bit rate on average; the output matrix has its own. "
    "Runs in ExLlamaV3 only, on GPUs.",
    "EXL2": "ExLlamaV2's mix of 2 to 8 bit groups, chosen per layer to meet an average; the output matrix often has 6 "
    "bits. Runs in ExLlamaV2 only, on GPUs.",
    "GGUF": "llama.cpp's formats; runs on CPUs and GPUs. A name such as Q4_K_M is a recipe that mixes tensor types and "
    "falls back to others where a width is no multiple of 256: compare the bits per weight, not the names. K- and "
    "I-quants may use an importance matrix, which changes the result and does not show in the name.",
    "VPTQ": "Vector quantization: indices into codebooks, which are counted in the bits per weight. Small models pay "
    "more for them.",
    "QTIP": "Trellis-coded weights after a random rotation; sign vectors and tables are counted.",
    "NVFP4": "4-bit floats (E2M1), one FP8 scale for each 16 weights and one scale a tensor: 4.5 bits, not 4. A16 "
    "quantizes the weights alone; W4A4 quantizes activations too, which costs accuracy. A weight-only kernel run "
    "on a W4A4 checkpoint hides that cost (marked †). Output matrix and embeddings usually stay in 16 bits.",
    "MXFP4": "4-bit floats, one power-of-two scale for each 32 weights: 4.25 bits.",
    "AWQ": "4-bit integers in groups (usually 128) with scale and zero point, weights scaled by measured activations.",
    "GPTQ": "3- to 8-bit integers in groups, rounded one column after another to make up for the error so far; depends "
    "on its calibration text.",
    "bitsandbytes": "Quantized while loading: 8-bit integers or 4-bit NF4/FP4 in blocks of 64, no calibration.",
    "AQLM": "Sums of codebook vectors; codebooks are counted in the bits per weight.",
    "Any-Precision": "One file with the model at several bit widths: the bits counted are those of the width that ran.",
    "HQQ": "2- to 8-bit integers in groups with scale and zero point, fitted to the weights without calibration text.",
    "FP8": "8-bit floats. “Dynamic” quantizes activations too, token by token.",
    "INT": "Integers by compressed-tensors: wNaM has N-bit weights and M-bit activations; “gK” groups of K weights.",
    "full precision": "The unquantized model in 16 or 32 bits: what the others are measured against.",
}
