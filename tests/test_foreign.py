"""Other methods' settings files say in our words what they mean, and what was left out."""

import pytest
import yaml
from typer.testing import CliRunner

from horse_plugin import HORSEHyperParams
from horse_plugin.cli.main import app

MEND = """
alg_name: MEND
archive: ./results/mend
model_name: m
inner_params: [model.layers.3.mlp.up_proj.weight, model.layers.3.mlp.down_proj.weight]
lr: 1e-6
edit_lr: 1e-4
cedit: 0.1
grad_clip: 100.
n_hidden: 1
batch_size: 1
"""
MEMIT = """
alg_name: MEMIT
model_name: m
layers: [4, 5]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
fact_token: subject_last
clamp_norm_factor: 4
"""
MALMEN = "alg_name: MALMEN\nmodel_name: m\nrank: 1920\nlr: 1e-6\nloc_coef: 0.6\ntoken: mask\n"
RELEASED = {
    "model": "name_or_path: m\nedit_modules: [model.layers.3.mlp.down_proj]\nhalf: True\n",
    "editor": "name: horse\nrank: 1920\nlr: 1e-5\nn_epochs: 1\ntoken: ans\ncache_dir: ./cache\n",
    "data": "name: cf\nn_edits: 8000\nbatch_size: 32\ntrain_path: x\n",
}


def convert(tmp_path, texts: dict[str, str]) -> tuple[HORSEHyperParams, str]:
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    out = tmp_path / "ours.yaml"
    files = [str(tmp_path / f"{name}.yaml") for name in texts]
    ran = CliRunner().invoke(app, ["convert-hparams", *files, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    return HORSEHyperParams.from_hparams(out), out.read_text()


def test_mend(tmp_path):
    ours, text = convert(tmp_path, {"mend": MEND})
    assert (ours.alg_name, ours.model_name, ours.archive) == ("HORSE", "m", None)
    assert (ours.meta_lr, ours.lr, ours.edit_coef) == (1e-6, None, 0.1)
    assert ours.max_grad_norm == 100 and not ours.inner_params
    for key in ("archive", "edit_lr", "n_hidden", "batch_size"):
        assert f"\n# {key}: " in text


def test_memit(tmp_path):
    ours, text = convert(tmp_path, {"memit": MEMIT})
    assert ours.inner_params == [f"model.layers.{i}.mlp.down_proj" for i in (4, 5)]
    assert ours.token == "subject" and ours.edit_sweeps > 1
    assert "# clamp_norm_factor: It is MEMIT's; ours is residual_cap." in text


def test_what_a_file_says_is_kept(tmp_path):
    text = "alg_name: HORSE\nmodel_name: m\ntoken: subject\nedit_sweeps: 5\nstrength: 1.5\n"
    ours, _ = convert(tmp_path, {"horse": text})
    assert (ours.edit_sweeps, ours.strength, ours.residual_cap) == (5, 1.5, 0.7)


def test_malmen(tmp_path):
    ours, _ = convert(tmp_path, {"malmen": MALMEN})
    assert (ours.rank, ours.lr, ours.loc_coef, ours.token) == (1920, 1e-6, 0.6, "ans")


@pytest.mark.parametrize("composed", [False, True])
def test_the_released_code(tmp_path, composed):
    files = RELEASED
    if composed:
        files = {"all": yaml.safe_dump({k: yaml.safe_load(v) for k, v in RELEASED.items()})}
    ours, text = convert(tmp_path, files)
    assert (ours.model_name, ours.half, ours.rank, ours.lr) == ("m", True, 1920, 1e-5)
    assert (ours.edits_per_step, ours.max_epochs) == (8000, 1)
    assert ours.inner_params == ["model.layers.3.mlp.down_proj"]
    assert "# cache_dir: " in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank: 3", "no model is named"),
        ("model_name: m\nrank: x", "rank: expected"),
        (MEMIT.replace("[4, 5]", "5"), "layers: expected a list of numbers, got 5"),
        (MEMIT.replace('"model.layers.{}.mlp.down_proj"', "7"), "a name with {} for each, got 7"),
        (MEMIT.replace("model.layers.{}", "m.{a}"), "got 'm.{a}.mlp.down_proj'"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    arguments = ["convert-hparams", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "y.yaml")]
    ran = CliRunner().invoke(app, arguments)
    assert says in str(ran.exception)
    assert not (tmp_path / "y.yaml").exists()
