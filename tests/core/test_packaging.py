"""Contents of the wheel: both install modes must have the hook, the tasks and the bundled text."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp(request.param)
    code = f"import sys, hatchling.build; hatchling.build.{request.param}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_hook_is_installed_into_site_packages(wheel: zipfile.ZipFile) -> None:
    assert wheel.read("lmeval_ext_hook.pth") == (ROOT / "lmeval_ext_hook.pth").read_bytes()
    paths = sorted(n for n in wheel.namelist() if n.endswith(".pth"))
    assert paths.index("lmeval_ext_hook.pth") == len(paths) - 1  # after the editable install's own path file


def test_wheel_has_only_packages_and_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    if any(n.startswith("_editable") for n in names):
        return  # its files stay in the checkout
    for needed in (
        "lmeval_ext/tasks/wiki2_strided.yaml", "lmeval_ext/tasks/sample.txt", "compare/cli.py",
        "compare/report/templates/report.html.j2", "compare/report/page.css",
    ):  # fmt: skip
        assert needed in names
    tops = {n.split("/")[0] for n in names if not n.endswith(".pth")}
    assert tops == {"lmeval_ext", "compare", next(t for t in tops if t.endswith(".dist-info"))}
    assert sum(i.file_size for i in wheel.infolist()) < 2_500_000


def test_core_needs_no_engine_and_extras_exist(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))
    assert {"vllm", "gguf", "exl3", "exl2", "quant"} <= set(metadata.get_all("Provides-Extra") or [])
    core = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert not [r for r in core if r.startswith(("torch", "vllm", "llama", "exllama", "compressed", "accelerate"))]
    scripts = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "compare = compare.cli:main" in scripts
    assert "lmeval-compare = compare.cli:main" in scripts


def test_wheel_has_no_bytecode(wheel: zipfile.ZipFile) -> None:
    assert not [n for n in wheel.namelist() if "__pycache__" in n or Path(n).suffix == ".pyc"]
