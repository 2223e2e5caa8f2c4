"""The cost of each part against a forward of Transformers with the one matrix exchanged by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from compare.cli import main as compare_main
from lmeval_ext.attribution.weights import changed_matrices
from lmeval_ext.errors import UserError
from tests.conftest import evaluate, load_task, make_llama

pytestmark = pytest.mark.engine

SETTINGS = {"eval_len": 64, "stride": 64, "max_rows": 10}


def rounded(original: torch.nn.Module, step: float = 0.05) -> dict[str, torch.Tensor]:
    """The decoder's matrices on a coarse grid."""
    return {
        name: (p.detach() / step).round() * step
        for name, p in original.named_parameters()
        if p.ndim == 2 and "layers" in name
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """An original, a copy of it on a grid, and the original's reference."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("attribution")
    original = make_llama(root / "original")
    model = AutoModelForCausalLM.from_pretrained(original)
    model.load_state_dict(rounded(model), strict=False)
    shutil.copytree(original, root / "grid")
    model.save_pretrained(root / "grid")
    evaluate("hf_quant", "sample_strided", metadata=SETTINGS, pretrained=str(original), device="cpu",
             save_reference=str(root / "ref"))  # fmt: skip
    return root


def log_probabilities(model, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.tensor([list(map(int, ids[:-1]))])).logits[0].double().numpy()
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def test_costs_equal_those_of_matrices_exchanged_by_hand(checkpoints, tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "costs.json"
    code = compare_main([
        "attribute", str(out), "--original", str(checkpoints / "original"), "--quantized", str(checkpoints / "grid"),
        "--reference", str(checkpoints / "ref"), "--task", "sample_strided", "--metadata", json.dumps(SETTINGS),
        "--dtype", "float32", "--device", "cpu", "--plot", str(tmp_path / "costs.svg"),
    ])  # fmt: skip
    assert code == 0
    assert "layer 1 mlp.down\\_proj" in capfd.readouterr().out
    found = json.loads(out.read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "original")
    grid, plain = rounded(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    task = load_task("sample_strided", pretrained=str(checkpoints / "original"), **SETTINGS)
    windows = [task.tokens.ids[w.start : w.end] for w in task.windows]
    reference = [log_probabilities(model, ids) for ids in windows]

    def divergence(names: list[str]) -> float:
        model.load_state_dict({name: grid[name] for name in names}, strict=False)
        total = 0.0
        for ids, log_p in zip(windows, reference, strict=True):
            total += float((np.exp(log_p) * (log_p - log_probabilities(model, ids))).sum())
        model.load_state_dict({name: plain[name] for name in names}, strict=False)
        return total / (63 * len(windows))

    assert found["scored_tokens"] == 630
    assert abs(found["base"]["kld"]) < 1e-7
    assert found["whole"]["kld"] == pytest.approx(divergence(list(grid)), rel=1e-4)
    by_name = {part["name"]: part for part in found["parts"]}
    assert len(by_name) == len(grid) == 14
    for layer, kind in ((0, "self_attn.q_proj"), (1, "mlp.down_proj")):
        part, name = by_name[f"layer {layer} {kind}"], f"model.layers.{layer}.{kind}.weight"
        assert part["kld"] == pytest.approx(divergence([name]), rel=1e-4)
        assert part["weights"] == grid[name].numel()
    costs = math.fsum(part["kld"] - found["base"]["kld"] for part in found["parts"])
    assert found["additivity"] == pytest.approx(costs / (found["whole"]["kld"] - found["base"]["kld"]))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False)
    )  # fmt: skip


def test_modules_that_keep_codes_are_multiplied():
    class Codes(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.codes = torch.nn.Buffer((linear.weight.detach() / 0.05).round().to(torch.int8))
            self.bias = torch.nn.Parameter(torch.ones(linear.out_features))

        def forward(self, x):
            return x @ (self.codes.float() * 0.05).t() + self.bias

    original, quantized = llama(), llama()
    layer = quantized.model.layers[0].self_attn
    layer.v_proj = Codes(layer.v_proj)
    changed = changed_matrices(original, quantized, "codes")
    assert list(changed) == ["model.layers.0.self_attn.v_proj.weight"]
    torch.testing.assert_close(changed["model.layers.0.self_attn.v_proj.weight"], layer.v_proj.codes.float() * 0.05)


@pytest.mark.parametrize("kind", ["norm", "columns", "rotation", "other shape", "equal"])
def test_weights_that_mean_something_else_alone_are_refused(kind):
    original, quantized = llama(), llama()
    layer = quantized.model.layers[0]
    with torch.no_grad():
        scales = torch.linspace(0.5, 2.0, 32)
        if kind == "norm":  # as AWQ does with the matrices after it
            layer.input_layernorm.weight.mul_(scales)
        elif kind == "columns":
            layer.self_attn.o_proj.weight.mul_(scales)
        elif kind == "rotation":
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight @ torch.linalg.qr(torch.randn(32, 32))[0])
        elif kind == "other shape":
            layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(16, 32))
            del layer.self_attn.o_proj.in_features
    expected = {"other shape": "is it another model", "equal": "no weight differs"}.get(kind, "scaled or rotated")
    with pytest.raises(UserError, match=expected) as error:
        changed_matrices(original, quantized, "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_rounding_of_any_width_is_accepted(bits):
    """Groups of 16, symmetric, round to nearest: the coarsest that anybody publishes."""
    original, quantized = llama(), llama()
    with torch.no_grad():
        for name, p in quantized.named_parameters():
            if p.ndim == 2 and "layers" in name:
                groups = p.view(p.shape[0], -1, 16)
                top = max(1, 2 ** (bits - 1) - 1)
                scale = groups.abs().amax(-1, keepdim=True) / top
                p.copy_((groups / scale).round().clamp(-top - 1, top).mul(scale).view_as(p))
    assert len(changed_matrices(original, quantized, "m")) == 7


def test_reference_without_the_windows_is_one_line(checkpoints, tmp_path):
    from lmeval_ext.attribution.__main__ import main

    arguments = [
        "--original", str(checkpoints / "original"), "--quantized", str(checkpoints / "grid"), "--reference",
        str(checkpoints / "ref"), "--task", "sample_strided", "--device", "cpu", "-o", str(tmp_path / "o"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="reference") as error:
        main([*arguments, "--metadata", json.dumps({**SETTINGS, "stride": 32})])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--task arc_easy: expected a task of token windows"):
        main([*arguments[:7], "arc_easy", *arguments[8:]])
    with pytest.raises(UserError, match="expected JSON"):
        main([*arguments, "--metadata", "{"])
    assert not Path(tmp_path / "o").exists()
