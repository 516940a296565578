"""A tokenizer that reads each text once, and many texts in one call."""

from collections.abc import Iterable


class Reader:
    """Stands in for a tokenizer, and remembers what that made of each text.

    A tokenizer with offsets reads all texts that are named beforehand in one call, which costs less
    than one call each. Keep a reader for a bounded number of texts, since it forgets none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: those that will be asked for with offsets.
    """

    def __init__(self, tokenizer, texts: Iterable[str]):
        self._tokenizer, self._read = tokenizer, {}
        texts = list(dict.fromkeys(texts))
        if tokenizer.is_fast and texts:
            options = {"return_offsets_mapping": True}
            found = tokenizer(texts, **options)
            for i, text in enumerate(texts):
                self._read[(text, *options)] = {name: of[i] for name, of in found.items()}

    def __call__(self, text: str, **options) -> dict:
        key = text, *options
        if key not in self._read:
            self._read[key] = self._tokenizer(text, **options)
        return self._read[key]

    def __getattr__(self, name: str):
        vars(self)[name] = value = getattr(self._tokenizer, name)  # which takes a while there
        return value
