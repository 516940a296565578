"""A wheel holds everything: installed without the checkout, it edits a tiny model."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from horse_plugin import HORSEHyperParams
from tests import ROOT, tiny

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh environment with our wheel; other packages are seen from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    )
    here = next(p for p in sys.path if p.endswith("site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "-q", wheel, cwd=folder)
    (site / "libraries.pth").write_text(f"{here}\n")  # whose own .pth files are not followed
    return folder


def test_the_command_and_an_edit_run_from_the_wheel(installed):
    horse, python = installed / "env/bin/horse", installed / "env/bin/python"
    where = run(python, "-c", "import horse_plugin; print(horse_plugin.__file__)", cwd=installed)
    assert str(installed) in where
    assert "horse-plugin 0.2.0" in run(horse, "--version", cwd=installed)
    assert "horse-plugin 0.2.0" in run(python, "-m", "horse_plugin", "--version", cwd=installed)
    tiny.files(installed)
    said = run(
        *(horse, "edit", "--hparams", "tiny", "--data", "val.json", "--out", "edit"),
        cwd=installed,
        OMP_NUM_THREADS="1",
    )
    assert "Edit: edit" in said
    assert (installed / "edit/delta.safetensors").is_file()
    run(horse, "report", "edit", cwd=installed)
    assert "of 6 facts hold" in (installed / "edit/report.html").read_text()


def test_the_wheel_holds_facts_text_yamls_the_archive_and_types(installed):
    code = """
        from importlib.resources import files
        from horse_plugin import FACTS, HORSEHyperParams, default_hparams, load_records
        from horse_plugin.assets import CALIBRATION, HELDOUT, TRAINED
        print(len(load_records(FACTS / "edit.json")), default_hparams().model_name)
        print(HORSEHyperParams.from_hparams("hparams/HORSE/llama2-7b").model_name)
        print(files("horse_plugin").joinpath("py.typed").is_file())
        print(CALIBRATION.is_file(), HELDOUT.is_file())
        from horse_plugin.editing.archive import read_network
        print(read_network("shipped")[2]["step"], (TRAINED / "LICENCE.txt").is_file())
    """
    python = installed / "env/bin/python"
    said = run(python, "-c", "\n".join(line.strip() for line in code.splitlines()), cwd=installed)
    model = HORSEHyperParams.from_hparams("llama2-7b").model_name
    assert said.split() == ["500", "llama-smollm2-135m", model, *["True"] * 3, "40", "True"]
