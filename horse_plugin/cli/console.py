"""The console that every command prints to. It loads without torch."""

from rich.console import Console

from horse_plugin.errors import visible


class PlainConsole(Console):
    """A console that shows text as it is: no markup, no emoji names, no control characters.

    What we print comes from files of others in many places: facts, names, paths, versions.
    """

    def __init__(self):
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **kwargs):
        return super().render_str(visible(text), **kwargs)
