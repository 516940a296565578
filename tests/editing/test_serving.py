"""The lines of docs/serving.md, as far as their programs can be installed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from horse_plugin import HorseEditor, default_hparams
from horse_plugin.assets.default_model import resolve
from horse_plugin.editing.export import save_adapter, to_rank
from horse_plugin.editing.settings import EXAMPLE_FACTS
from tests import ROOT, tiny

PAGE = (ROOT / "docs/serving.md").read_text()
LLAMA_CPP = os.environ.get("LLAMA_CPP_HOME")


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A model on disk and an adapter with an edit of it: (the edit's adapter, edited, prompts)."""
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("base")
    tiny.bpe_tokenizer().save_pretrained("base")
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    settings = tiny.hparams(strength=3.0, ridge=0.01, edit_sweeps=8)
    editor = HorseEditor(model, tiny.bpe_tokenizer(), settings)
    delta = editor.edit(tiny.records())
    editor.undo()
    adapter = to_rank(editor, [delta])
    save_adapter(adapter, editor.backbone, "adapter", [delta])
    return adapter, editor.backbone.prepare(tiny.records(), ["edit"]).flat()


def says(model, prompt) -> bool:
    logits = model(input_ids=torch.tensor([prompt.inputs])).logits[0, prompt.start - 1 :]
    return tuple(logits.argmax(-1)) == prompt.answer


def test_peft_loads_switches_and_merges_the_edit(edited):
    example, _ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    loaded, merged = example.split("with model.disable_adapter():")
    exec(loaded, names := {})
    model, (_, prompts) = names["model"], edited
    assert sum(says(model, p) for p in prompts) >= 4
    with model.disable_adapter():
        assert not any(says(model, p) for p in prompts)
    exec("with model.disable_adapter():" + merged, names)
    assert sum(says(names["model"], p) for p in prompts) >= 4
    assert "peft" not in type(names["model"]).__module__


needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP, reason="LLAMA_CPP_HOME names no checkout of llama.cpp"
)


def convert(what):
    """Run the page's conversion of the ``hf`` model or of the ``lora`` adapter."""
    (line,) = re.findall(rf"^    python llama\.cpp/(convert_{what}_.+)$", PAGE, re.M)
    script, *words = shlex.split(line)
    command = [sys.executable, str(Path(LLAMA_CPP, script)), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_llama_cpp
def test_llama_cpp_converts_the_edit_as_it_is(edited):
    convert("lora")
    found = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader("adapter.gguf").tensors}
    factors = edited[0].factors
    assert len(found) == 2 * len(factors)
    for module, (keys, values) in factors.items():
        name = f"blk.{module.split('.')[2]}.ffn_down.weight"
        shift = found[f"{name}.lora_a"].T @ found[f"{name}.lora_b"].T
        torch.testing.assert_close(shift, keys.T @ values)


@needs_llama_cpp
@pytest.mark.real_model
@pytest.mark.slow
def test_llama_cpp_writes_the_new_answers_on_a_quantised_base(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    editor = HorseEditor.from_hparams(default_hparams())
    Path("base").symlink_to(resolve(editor.hparams.model_name))
    Path("facts.json").write_text(EXAMPLE_FACTS)
    delta = editor.edit("facts.json")
    editor.undo()
    save_adapter(to_rank(editor, [delta], max_error=0.05), editor.backbone, "adapter", [delta])
    convert("hf")
    convert("lora")
    _, example = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(example, names := {})
    assert names["answer"].split()[0].startswith("Bergen")
    question = names["question"] | {"prompt": "The capital of France is"}
    other = names["server"].handle_completions(question)["choices"][0]["text"]
    assert other.split()[0].startswith("Paris")
