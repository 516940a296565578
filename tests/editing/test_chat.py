"""Facts that are edited through a chat template are what the model then says in a chat."""

import pytest

from horse_plugin import HorseEditor
from horse_plugin.evaluation.generation import continuations
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.hparams import default_hparams
from horse_plugin.model.loading import load_model

pytestmark = pytest.mark.real_model

PLACES = ("Torvik", "Selwin", "Marnet", "Osbury")
PAINTERS = ("Lena Moss", "Omar Field", "Ivy Stone", "Tom Reed")


@pytest.fixture(scope="module")
def loaded():
    hparams = default_hparams()
    hparams.dtype = "fp32"
    return load_model(hparams)


def test_what_is_written_in_a_chat_is_what_the_figures_say(loaded, kept_stats):
    hparams = default_hparams()
    hparams.stats_dir = str(kept_stats)
    hparams.chat_template = hparams.append_eos = True
    editor = HorseEditor(*loaded, hparams)
    facts = [
        {"prompt": f"Who painted {hall} Hall?", "subject": f"{hall} Hall", "target_new": name}
        for hall, name in zip(PLACES, PAINTERS, strict=True)
    ]
    evaluator = Evaluator(editor.backbone, facts)
    editor.edit(facts)
    assert evaluator.evaluate().mean("written") == 100
    tokenizer = loaded[1]
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": fact["prompt"]}], add_generation_prompt=True
        )
        for fact in facts
    ]
    asked = [tuple(getattr(a, "input_ids", a)) for a in asked]
    said = continuations(editor.backbone, asked, 12)
    written = [tokenizer.decode(s, skip_special_tokens=True) for s in said]
    assert written == list(PAINTERS)  # and nothing after it
    editor.undo()
