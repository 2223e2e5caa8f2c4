"""The bound that tells rounding from a fault: an engine with a quantized checkpoint against its float32 decoded twin.

The floor is the same engine with unquantized weights, against their own float32 reference. What differs from a float32
model by rounding alone has two kinds of tokens. Nearly all differ by about the floor's median: 10⁻⁶ nats in float16,
2·10⁻⁴ in bfloat16. A few, for which rounding chose another expert, differ by up to 0.4 nats in float16, where one to
four tokens of 2,040 did, and by several nats in bfloat16. Their number is chance, and they are nearly all of the mean:
of the EXL3 mixture's 3.4·10⁻⁴, one token is 2.1·10⁻⁴.

So quantiles are held close to the floor's, and the mean gets room for a few such tokens. A wrong matrix, scale or
expert changes every token that it multiplies, by much more: an expert of 8, of which 2 are chosen, multiplies a quarter
of the tokens, so the 90 % quantile shows it. The smallest error of a quantization that was measured, of FP8
activations, has a median of 3·10⁻³, which is 20 times the floor's in bfloat16 and 2,000 times that in float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# Metric: how many times the floor's, and how much more in nats. 10⁻³ in the mean of 2,040 tokens are 2 nats in all:
# five tokens like the worst one of float16
BOUNDS = {"kld_median": (2.0, 1e-5), "kld_p90": (2.0, 5e-5), "kld": (3.0, 1e-3)}
PPL_RATIO = 0.01


def beyond_rounding(figures: Mapping[str, float], floor: Mapping[str, float]) -> list[str]:
    """The bounds that a result exceeds, each as a line; empty if rounding alone explains it."""
    return list(_exceeded(figures, floor))


def _exceeded(figures: Mapping[str, float], floor: Mapping[str, float]) -> Iterator[str]:
    for metric, (times, more) in BOUNDS.items():
        bound = times * floor[metric] + more
        if not figures[metric] <= bound:
            yield f"{metric} {figures[metric]:.3g} > {bound:.3g} = {times:g} × {floor[metric]:.3g} + {more:g}"
    if not abs(figures["ppl_ratio"] - 1) <= PPL_RATIO:
        yield f"ppl_ratio {figures['ppl_ratio']:.4f}, beyond 1 ± {PPL_RATIO:g}"
