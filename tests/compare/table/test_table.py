"""`compare table` on result files as the harness writes them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from compare.text import metric_text
from tests.compare.conftest import fill_with_ladders


def test_json_has_the_documented_fields(folder, compare):
    folder.add("EXL3 4.0bpw", "EXL3", "exl3", 4.037704, 25.8657, 1.25, head_bpw=6.021160, vram_gb=0.09855)
    (record,) = compare("table", folder.path, "--format", "json").json
    expected = {
        "label": "EXL3 4.0bpw", "layer_bpw": 4.037704, "head_bpw": 6.021160, "vram_gb": 0.09855, "ppl": 25.8657,
        "stderr": 1.25, "windows": 20, "scored_tokens": 40940, "protocol": "exllama", "family": "EXL3",
        "engine": "vllm", "stride": 512, "comparable": True,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert len(record["tokens_sha256"]) == 64
    assert record["file"].endswith(".json")


def test_relative_to_baseline_worked_by_hand(folder, compare):
    folder.add("BF16", "full precision", "bfloat16", 16.0, 20.0)
    folder.add("Q4", "GGUF", "Q4_0", 4.5, 21.0)
    records = compare("table", folder.path, "--format", "json").by_label()
    assert records["Q4"]["relative_to_reference"] == pytest.approx(0.05, rel=1e-12)
    assert records["BF16"]["relative_to_reference"] is None
    assert "+5.00%" in compare("table", folder.path).out


def test_rows_are_sorted_by_family_then_bits(folder, compare):
    for label, family, bpw in (("g8", "GGUF", 8.5), ("e4", "EXL3", 4.0), ("g2", "GGUF", 2.6), ("x", "Mystery", 3.0)):
        folder.add(label, family, label, bpw, 10 - bpw / 2)
    folder.add("bf", "full precision", "bfloat16", 16.0, 5.0)
    assert [r["label"] for r in compare("table", folder.path, "--format", "json").json] == ["bf", "e4", "g2", "g8", "x"]


@pytest.mark.parametrize(
    ("metric", "order"), [("token_perplexity", ["b", "c", "a"]), ("top1_accuracy", ["a", "c", "b"])]
)
def test_sort_by_metric_puts_the_best_first_in_either_direction(folder, compare, metric, order):
    from tests.compare.conftest import result

    for label, ppl, accuracy in (("a", 9.0, 0.6), ("b", 7.0, 0.4), ("c", 8.0, 0.5)):
        content = result(label, "GGUF", label, 4.0, ppl)
        content["results"]["wiki2_strided"]["top1_accuracy,none"] = accuracy
        folder.write(content)
    out = compare("table", folder.path, "--format", "json", "--sort", "metric", "--metric", metric)
    assert [r["label"] for r in out.json] == order


def test_csv_and_markdown_escape_labels(folder, compare, tmp_path):
    folder.add("Q4|K *M* <b>", "GGUF", "Q4_K_M", 4.85, 8.5)
    folder.add("=HYPERLINK(1)", "GGUF", "Q2_K", 2.6, 9.5)
    rows = list(csv.DictReader(io.StringIO(compare("table", folder.path, "--format", "csv").out)))
    assert [row["label"] for row in rows] == ["'=HYPERLINK(1)", "Q4|K *M* <b>"]
    assert float(rows[1]["ppl"]) == 8.5
    target = tmp_path / "table.md"
    assert compare("table", folder.path, "-o", target).code == 0
    assert r"| Q4\|K \*M\* \<b\> |" in target.read_text()


def test_output_file_leaves_no_temporary_file(folder, compare, tmp_path):
    folder.add()
    target = tmp_path / "out.json"
    target.write_text("old")
    assert compare("table", folder.path, "-o", target).code == 0
    assert len(json.loads(target.read_text())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results", "out.json"] or len(list(tmp_path.iterdir())) == 2


def test_mask_keeps_labels_that_contain_a_part_in_any_case(folder, compare):
    fill_with_ladders(folder)
    out = compare("table", folder.path, "--format", "json", "--mask", "exl3 ;Q4_k")
    assert {r["label"] for r in out.json} == {f"EXL3 {b}" for b in ("2.0", "2.5", "3.0", "4.0", "5.0")} | {
        "GGUF Q4_K_M"
    }
    nothing = compare("table", folder.path, "--mask", "zzz")
    assert nothing.code == 2
    assert "EXL3 2.0" in nothing.err


def test_limits_name_the_models_left_out(folder, compare):
    fill_with_ladders(folder)
    out = compare("table", folder.path, "--format", "json", "--max-x", 5.5, "--max-y", 12)
    left = {line.split(": ")[2] for line in out.err.splitlines() if "left out" in line}
    assert left == {"EXL2 2.25", "EXL3 2.0", "EXL2 6.0", "GGUF Q5_K_M", "GGUF Q6_K"}
    assert not left & {r["label"] for r in out.json}
    assert "BF16" in {r["label"] for r in out.json}, "a baseline is a line without a place on x"


@pytest.mark.parametrize(
    ("label", "printed"),
    [
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("\u202eevil", r"\u202eevil"),
        ("שלום 🙂", "שלום 🙂"),
        ("\ud800", r"\ud800"),
        ("$x^2$", "$x^2$"),
        ("My model [red]", "My model"),
        ("[#ff8800] My model", "My model"),
        ("My model [notacolour]", "My model"),
        ("v [4.0]", "v [4.0]"),
    ],
)
def test_labels_are_shown_as_text(folder, compare, label, printed):
    folder.add(label)
    (record,) = compare("table", folder.path, "--format", "json").json
    assert record["label"] == printed
    terminal = compare("table", folder.path)
    assert printed in terminal.out
    assert "\x1b" not in terminal.out


def test_help_imports_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys; before = set(sys.modules); from compare.cli import build_parser; build_parser();"
        "heavy = {'matplotlib', 'pandas', 'scipy', 'numpy', 'rich', 'torch', 'transformers', 'lm_eval', 'lmeval_ext'};"
        "sys.exit(','.join(heavy & (set(sys.modules) - before)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_table_imports_no_engine_and_no_matplotlib(folder):
    import subprocess
    import sys

    folder.add()
    code = (
        f"import sys; from compare.cli import main; main(['table', {str(folder.path)!r}]);"
        "sys.exit(','.join({'matplotlib', 'torch', 'transformers', 'lm_eval'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("undrawn")
def test_huge_figures_are_readable_and_a_log_scale_is_offered(folder, compare, tmp_path):
    folder.add("BF16", "full precision", "bfloat16", 16.0, 6.2)
    folder.add("W2", "EXL3", "exl3-2.0bpw", 2.0, 3.4e37, 1e37)
    out = compare("table", folder.path)
    assert "3.4e+37 ± 1e+37" in out.out
    plotted = compare("plot", folder.path, "-o", tmp_path / "p.png")
    assert "perplexity from 6.2 to 3.4e+37: --log-y draws it on a logarithmic axis" in plotted.err
    assert "--log-y" not in compare("plot", folder.path, "-o", tmp_path / "p.png", "--log-y").err


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (999_999.0, 12.3, "999999.0000 ± 12"),
        (1_234_567.0, 3_200_000.0, "1.235e+06 ± 3.2e+06"),
        (8.5, 0.11, "8.5000 ± 0.11"),
    ],
)
def test_figures_from_a_million_on_have_four_digits(value, error, expected):
    assert metric_text(value, error) == expected
