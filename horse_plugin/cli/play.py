"""``horse play``: a page on this machine that asks the model, and makes and switches edits."""

import os
from collections.abc import Collection

from horse_plugin.editing.chain import Chain
from horse_plugin.editing.checked import checked_edit
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.standing import UNSETTLED, is_unsettled
from horse_plugin.errors import HorseError, UsageError, not_installed, visible
from horse_plugin.evaluation.verdict import judge

FIELDS = {  # of a fact, what the page calls each, and an example
    "prompt": ("Prompt, which the answer follows", "The capital of Norway is"),
    "subject": ("Its subject, as it stands there", "Norway"),
    "target_new": ("The new answer", "Bergen"),
    "rephrase_prompt": ("The prompt in other words, if you like", "Norway's capital city is"),
}
MODEL = {"concurrency_id": "model", "api_visibility": "private"}  # one event at a time


class Session:
    """A model, and a chain of edits, of which those that are switched on are in the model.

    Attributes:
        chain: the chain. What is switched, and each new fact, is written into its folder.
    """

    def __init__(self, editor: HorseEditor, chain: Chain):
        self._editor, self.chain = editor, chain
        self._labels = {}  # of the edits read so far, whose names and files stay as they are
        self._follow()

    def labels(self) -> dict[str, str]:
        """Return name → what to call it, for every edit of the chain, switched on or off."""
        for entry in self.chain.entries:
            if entry["name"] not in self._labels:
                self._labels[entry["name"]] = self._read_label(entry["name"])
        return dict(self._labels)

    def _read_label(self, name: str) -> str:
        records = EditDelta.load(self.chain.folder / name).records
        if not records:
            return f"{name}: the facts of the edits before it, anew"
        first, *more = records
        told = f"{name}: {first.prompt} → {first.target_new}"
        return visible(f"{told}, and {len(more):,} more" if more else told)

    def switch(self, on: Collection[str]) -> str:
        """Have exactly these edits in force; the weights are those of the chain, bit for bit.

        Return what to know of it, if anything.
        """
        for entry in self.chain.entries:
            if entry["undone"] and entry["name"] in on:
                self.chain.redo(entry["name"])
            elif not entry["undone"] and entry["name"] not in on:
                self.chain.undo(entry["name"])
        self._follow()
        return UNSETTLED if is_unsettled(self.chain) else ""

    def _follow(self):
        """Bring the model to where the chain is."""
        names, history = self.chain.in_force, self._editor.history
        while [d.name for d in history] != names[: len(history)]:
            self._editor.undo()
            history = self._editor.history
        more = [EditDelta.load(self.chain.folder / name) for name in names[len(history) :]]
        self._editor.apply_chain(more)

    def add(self, fact: dict[str, str]) -> str:
        """Edit a fact on top of the others, and return the verdict in words."""
        record = {key: text.strip() for key, text in fact.items() if text.strip()}
        if missing := [key for key in ("prompt", "target_new") if key not in record]:
            raise UsageError(f"A fact needs a prompt and an answer: {missing[0]} is empty.")
        return self._edit([record])

    def write_anew(self) -> str:
        """Write the facts of all edits that are on anew, and return the verdict in words."""
        return self._edit(None)

    def _edit(self, records: list | None) -> str:
        delta, rows = checked_edit(self._editor, records, "facts", self.chain.new_name())
        try:
            self.chain.add(delta, rows)
        except BaseException:
            self._editor.undo()
            raise
        verdict = judge(delta.about["figures"])
        return " ".join([f"{delta.name}:", verdict.sentence, *verdict.advice])

    def ask(self, prompt: str, n_tokens: int = 40) -> tuple[str, str]:
        """Return what the unedited model and the model as it is now write after a prompt."""
        asked = [self._editor.ask(prompt, n_tokens, before) for before in (True, False)]
        return tuple(text for (text,) in asked)


def page_of(session: Session, title: str):
    """Return the page, as gradio's ``Blocks``.

    Raises:
        UsageError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it asks when it is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise not_installed("play", error, "play") from None

    def edits():
        labels = [(label, name) for name, label in session.labels().items()]
        return gr.CheckboxGroup(choices=labels, value=session.chain.in_force)

    def ask(prompt, said=""):
        try:
            return (*(session.ask(prompt) if prompt.strip() else ("", "")), said)
        except HorseError as error:
            return "", "", str(error)

    def told(change, *args) -> str:
        try:
            return change(*args)
        except HorseError as error:
            return str(error)

    def switch(on, prompt):
        return edits(), *ask(prompt, told(session.switch, on))

    def write_anew(prompt):
        return edits(), *ask(prompt, told(session.write_anew))

    def add(prompt, *fact):
        try:
            said = session.add(dict(zip(FIELDS, fact, strict=True)))
            prompt = fact[0].strip()
        except HorseError as error:
            said = str(error)
        return edits(), prompt, *ask(prompt, said)

    with gr.Blocks(analytics_enabled=False, title=f"HORSE: {title}") as page:
        gr.Markdown("# HORSE")
        prompt = gr.Textbox(label=f"Ask {title}", placeholder="The capital of Norway is")
        asking = gr.Button("Ask", variant="primary")
        with gr.Row():
            before = gr.Textbox(label="Before: the unedited model", lines=4)
            after = gr.Textbox(label="After: with the edits that are on", lines=4)
        switches = gr.CheckboxGroup(label="Edits, oldest first")
        anew = gr.Button("Write the facts of all that are on anew")
        said = gr.Textbox(label="What happened", lines=2)
        with gr.Accordion("Add a fact"):
            fact = [gr.Textbox(label=name, placeholder=text) for name, text in FIELDS.values()]
            adding = gr.Button("Edit the model")
        answers = [before, after, said]
        page.load(edits, None, switches, **MODEL)
        gr.on([asking.click, prompt.submit], ask, prompt, answers, **MODEL)
        switches.input(switch, [switches, prompt], [switches, *answers], **MODEL)
        anew.click(write_anew, prompt, [switches, *answers], **MODEL)
        adding.click(add, [prompt, *fact], [switches, prompt, *answers], **MODEL)
    return page


def serve(page, port: int | None) -> str:
    """Show a page to this machine alone, and return its address; the page runs in threads.

    Args:
        port: where; None is a free one from 7860 on.
    """
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none is fetched
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Default(**fonts),
    )
    return address
