"""An edit as other programs load it: a plain Hugging Face folder, and a PEFT LoRA adapter."""

import json
import re
import subprocess
import sys

import peft
import pytest
import safetensors
import torch
import transformers

from horse_plugin import HorseEditor, UsageError, checked_edit
from horse_plugin.editing.export import save_adapter, to_rank
from tests import ROOT, tiny

IDS = torch.arange(60).reshape(4, 15) + 20


def saved_editor(tmp_path, architecture):
    """An editor on a model that lies on disk, as PEFT wants it."""
    tiny.model(architecture).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(strength=5.0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def through_peft(tmp_path):
    """The logits of the base model with the adapter, and with it merged."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    return logits(wrapped), logits(wrapped.merge_and_unload())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
def test_an_adapter_of_full_rank_is_the_edit(tmp_path, architecture):
    e = saved_editor(tmp_path, architecture)
    plain = logits(e.backbone.model)
    deltas = [e.edit(tiny.records(2)), e.edit(tiny.records(4)[2:])]
    edited = logits(e.backbone.model)
    e.undo(), e.undo()
    adapter = to_rank(e, deltas)
    assert torch.equal(logits(e.backbone.model), plain)
    assert adapter.error < 1e-6 and adapter.efficacy[0] == adapter.efficacy[1]
    assert adapter.rank == sum(
        len(e.backbone.tokenizer(f" {r.target_new}").input_ids) for d in deltas for r in d.records
    )
    save_adapter(adapter, e.backbone, tmp_path / "adapter")
    moved = (edited - plain).abs().max()
    for loaded in through_peft(tmp_path):
        assert (loaded - edited).abs().max() < 5e-3 * moved


def test_a_smaller_rank_keeps_the_most_and_says_what_it_loses(tmp_path):
    e = saved_editor(tmp_path, "llama")
    plain = logits(e.backbone.model)
    delta = e.edit(tiny.records(8))
    edited = logits(e.backbone.model)
    e.undo()
    errors = {}
    for rank in (1, 2, 4):
        adapter = to_rank(e, [delta], rank)
        shifts = delta.shifts.values()
        left = sum(torch.linalg.svdvals(s)[rank:].square().sum() for s in shifts)
        whole = sum(s.square().sum() for s in shifts)
        assert adapter.error == pytest.approx((left / whole).sqrt().item(), rel=1e-3)
        assert adapter.rank == rank
        errors[rank] = adapter.error
    assert errors[1] > errors[2] > errors[4] > 0
    with e.backbone.weights.shifted({m: k.T @ f for m, (k, f) in adapter.factors.items()}):
        truncated = logits(e.backbone.model)
    save_adapter(adapter, e.backbone, tmp_path / "adapter")
    for loaded in through_peft(tmp_path):
        assert (loaded - truncated).abs().max() < 5e-3 * (edited - plain).abs().max()


def test_the_least_rank_that_keeps_to_an_error_is_found(tmp_path):
    e = saved_editor(tmp_path, "llama")
    delta = e.edit(tiny.records(8))
    e.undo()
    adapter = to_rank(e, [delta], max_error=0.3)
    assert adapter.error <= 0.3 < to_rank(e, [delta], adapter.rank - 1).error
    assert to_rank(e, [delta], 1, max_error=0.3).rank == 1  # the rank is a limit, too


def test_the_rank_of_modules_of_several_widths_is_that_of_the_widest(tmp_path):
    names = [f"model.layers.5.{name}" for name in ("self_attn.k_proj", "mlp.down_proj")]
    hparams = tiny.hparams(inner_params=names, strength=5.0)
    e = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams)
    delta = e.edit(tiny.records(24))
    e.undo()
    assert to_rank(e, [delta], max_error=1e-3).error <= 1e-3


def test_a_rank_keeps_what_the_metric_charges_most(tmp_path):
    """There the factors of ΔW's own singular values are further from the edit."""
    e = saved_editor(tmp_path, "llama")
    delta = e.edit(tiny.records(8))
    e.undo()
    plain = to_rank(e, [delta], 2)
    e.use(e.backbone, tiny.hparams(preserve="shipped", stats_dir=str(tmp_path / "stats")))
    ours = to_rank(e, [delta], 2)

    shifts = {m: delta.shift(m).double() for m in delta.modules}

    def charged(adapter):
        total = 0.0
        for root, (module, (keys, values)) in zip(e.roots, adapter.factors.items(), strict=True):
            left = shifts[module] - keys.T.double() @ values.double()
            total += torch.linalg.solve(root.double(), left).square().sum().item()
        return total

    assert charged(ours) < charged(plain)
    whole = sum(
        torch.linalg.solve(root.double(), shifts[m]).square().sum().item()
        for root, m in zip(e.roots, shifts, strict=True)
    )
    assert ours.error == pytest.approx((charged(ours) / whole) ** 0.5, rel=1e-4)


def test_an_adapter_has_a_card_and_names_a_base_that_other_machines_have(tmp_path):
    e = saved_editor(tmp_path, "llama")
    delta, _ = checked_edit(e, tiny.records(4), "facts", "mine", max_rise=1e9)
    e.undo()
    save_adapter(to_rank(e, [delta]), e.backbone, tmp_path / "adapter", [delta])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    card = (tmp_path / "adapter/README.md").read_text()
    assert config["base_model_name_or_path"] == "base" and "base_model: base" in card
    assert "mine: 4 facts. " in card and "of 4 facts hold" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_dense_edit_becomes_an_adapter_by_its_singular_values(tmp_path):
    e = saved_editor(tmp_path, "llama")
    delta = e.edit(tiny.records(30))
    assert set(delta.tensors) == {f"{m}.shift" for m in delta.modules}
    edited = logits(e.backbone.model)
    e.undo()
    adapter = to_rank(e, [delta])
    assert adapter.rank == 32 and adapter.error < 1e-6
    save_adapter(adapter, e.backbone, tmp_path / "adapter")
    torch.testing.assert_close(through_peft(tmp_path)[1], edited, rtol=1e-4, atol=1e-5)


def test_an_adapter_comes_in_the_models_dtype_and_says_what_that_rounds(tmp_path):
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    e = HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(strength=5.0))
    delta = e.edit(tiny.records(4))
    e.undo()
    adapter = to_rank(e, [delta])
    assert 1e-5 < adapter.error < 0.01
    save_adapter(adapter, e.backbone, tmp_path / "adapter")
    with safetensors.safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_an_adapter_for_another_model_is_refused(tmp_path):
    delta = saved_editor(tmp_path, "llama").edit(tiny.records(2))
    other = HorseEditor(tiny.model(seed=1), tiny.bpe_tokenizer(), tiny.hparams())
    with pytest.raises(UsageError, match="made for"):
        to_rank(other, [delta])


def test_a_quantised_model_with_the_adapter_says_the_new_answers(tmp_path, monkeypatch):
    """The lines of docs/editing.md run as they stand; torchao's weights are refused themselves."""
    pytest.importorskip("torchao")
    tiny.model().save_pretrained(tmp_path / "model")
    settings = tiny.hparams(strength=3.0, ridge=0.01, edit_sweeps=8)
    float_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    e = HorseEditor(float_model, tiny.bpe_tokenizer(), settings)
    delta = e.edit(tiny.records())
    prompts = e.backbone.prepare(tiny.records(), ["edit"]).flat()
    e.undo()
    save_adapter(to_rank(e, [delta]), e.backbone, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/editing.md").read_text(), re.S)
    exec(example, names := {})
    model = names["model"]
    for p in prompts:
        ids = torch.tensor([p.inputs])
        assert tuple(model(input_ids=ids).logits[0, p.start - 1 :].argmax(-1)) == p.answer
        with model.disable_adapter():
            assert tuple(model(input_ids=ids).logits[0, p.start - 1 :].argmax(-1)) != p.answer
    with pytest.raises(UsageError, match="quantised or packed"):
        HorseEditor(model.unload(), tiny.bpe_tokenizer(), settings)


def test_a_saved_model_with_code_of_its_own_still_names_it(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    tiny.bpe_tokenizer().save_pretrained(base)
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    own = {name: f"modeling_own.{of}" for name, of in own.items()}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (base / "config.json").write_text(json.dumps(config))
    settings = {"trust_remote_code": True, "strength": 5.0}
    e = HorseEditor.from_hparams(tiny.hparams(model_name=str(base), **settings))
    e.edit(tiny.records())
    e.save_model(tmp_path / "model")
    opened = HorseEditor.from_hparams(tiny.hparams(model_name=str(tmp_path / "model"), **settings))
    assert torch.equal(logits(opened.backbone.model), logits(e.backbone.model))


@pytest.mark.slow
def test_a_saved_model_opens_in_transformers_without_this_package(tmp_path):
    e = saved_editor(tmp_path, "llama")
    e.edit(tiny.records())
    e.save_model(tmp_path / "model")
    code = f"""if True:
        import sys, json, torch
        sys.modules["horse_plugin"] = None  # importing it fails
        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
        transformers.AutoTokenizer.from_pretrained({str(tmp_path / "model")!r})
        ids = torch.arange(60).reshape(4, 15) + 20
        print(json.dumps(model(input_ids=ids).logits.tolist()))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    opened = torch.tensor(json.loads(run.stdout))
    torch.testing.assert_close(opened, logits(e.backbone.model), rtol=1e-5, atol=1e-6)
