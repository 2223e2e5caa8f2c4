"""demo/demo.py: its steps fit the spec files that it runs."""

from __future__ import annotations

import yaml

import demo

from .tiny import ROOT

SPECS = ROOT / "specs" / "demo"
MODELS = yaml.safe_load((SPECS / "models.yaml").read_text())["models"]
PATHS = {entry["label"]: (SPECS / entry["args"]["pretrained"]).resolve() for entry in MODELS}
ALL_STAGES = (*demo.STAGES, demo.FULL_STAGE)


def test_full_demo_runs_every_model_of_the_spec() -> None:
    assert sorted(label for stage in ALL_STAGES for label in stage) == sorted(PATHS)


def test_mask_of_each_stage_selects_its_models_alone() -> None:
    labels: list[str] = []
    for stage in ALL_STAGES:
        labels += stage
        command = demo.evaluating(labels)[2]
        mask = command[command.index("-mask") + 1].split(";")
        assert {label for label in PATHS if any(part.lower() in label.lower() for part in mask)} == set(labels)


def test_checkpoints_are_made_where_the_spec_looks_for_them() -> None:
    commands = [command for stage in ALL_STAGES for label in stage for _, _, command in demo.making(label)]
    made = {argument for command in commands for argument in command}
    assert all(str(path) in made for label, path in PATHS.items() if label != "BF16")
    assert PATHS["BF16"] == demo.MODEL
    first = next(entry for entry in MODELS if entry.get("reference"))
    assert first["label"] == "BF16" == demo.STAGES[0][0]


def test_demo_ends_with_the_answer_in_words() -> None:
    what, done, command = demo.writing()[-1]
    assert (what, done()) == ("the answer", False)
    assert command[1:] == ["choose", str(demo.RUNS), "--max-loss", "0.1"]
