"""Which matrices are exchanged together."""

from __future__ import annotations

from lmeval_ext.attribution.parts import Part, layer_and_kind, parts_of

NAMES = [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.0.up_proj.weight",
    "model.layers.1.mlp.experts.1.up_proj.weight", "lm_head.weight",
]  # fmt: skip


def test_layer_and_kind_of_each_matrix():
    assert [layer_and_kind(name) for name in NAMES] == [
        (0, "self_attn.q_proj"), (0, "mlp.experts.gate_up_proj"), (1, "self_attn.q_proj"), (1, "mlp.experts.up_proj"),
        (1, "mlp.experts.up_proj"), (None, "lm_head"),
    ]  # fmt: skip


def test_experts_of_a_layer_are_one_part():
    parts = parts_of(NAMES, "matrix")
    assert [part.name for part in parts] == [
        "layer 0 self_attn.q_proj", "layer 0 mlp.experts.gate_up_proj", "layer 1 self_attn.q_proj",
        "layer 1 mlp.experts.up_proj", "lm_head",
    ]  # fmt: skip
    assert parts[3].matrices == tuple(NAMES[3:5])


def test_layers_and_kinds():
    assert parts_of(NAMES, "layer") == [
        Part("layer 0", tuple(NAMES[:2]), 0, None), Part("layer 1", tuple(NAMES[2:5]), 1, None),
        Part("lm_head", (NAMES[5],), None, "lm_head"),
    ]  # fmt: skip
    assert parts_of(NAMES, "kind")[0] == Part("self_attn.q_proj", (NAMES[0], NAMES[2]), None, "self_attn.q_proj")
