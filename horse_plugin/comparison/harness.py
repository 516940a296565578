"""The model ``horse`` of lm-evaluation-harness: any of its tasks on a model with edits.

Importing this module registers it, as the harness asks of models from outside. Its own command line
runs with ``python -m horse_plugin.comparison.harness`` in the place of ``lm_eval``.
"""

from dataclasses import replace

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.editing.chain import read_edits
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.hparams import HORSEHyperParams


@register_model("horse")
class HorseLM(HFLM):
    """A Hugging Face model of the harness with the edits of a folder in its weights.

    Args:
        hparams: the YAML, or the name of a shipped one.
        delta: the folder of an edit or of a chain of them, or its name on the hub; None is the
            model as it is.
        kwargs: of the harness's ``HFLM``, such as ``batch_size``.

    Attributes:
        editor: the :class:`horse_plugin.HorseEditor` of the model, with the edits in force.
    """

    def __init__(self, hparams: str = DEFAULT_MODEL, delta: str | None = None, **kwargs):
        settings = HORSEHyperParams.from_hparams(hparams)
        self.editor = HorseEditor.from_hparams(replace(settings, archive=None))
        self.editor.apply_chain(read_edits(delta) if delta else [])
        kwargs.pop("device", None)  # the YAML's
        backbone = self.editor.backbone
        super().__init__(backbone.model, tokenizer=backbone.tokenizer, **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
