"""A judge of what a model wrote: a language model behind any URL of OpenAI's style.

Nothing is sent unless a URL is given. The key is read from the environment alone, and the answers
are kept in a file, so that none is asked for twice.
"""

import http.client
import ipaddress
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horse_plugin.errors import HorseError, UsageError, counted, first_line
from horse_plugin.evaluation.written import Written
from horse_plugin.storage.digest import json_digest
from horse_plugin.storage.schema import read_text

KEY = "HORSE_JUDGE_KEY"  # the variable of the environment that holds the key, if one is needed
SECONDS = 60  # to wait for an answer
QUESTION = """Grade an answer to a question or to the beginning of a sentence.

Given: {prompt}
Right answer: {wanted}
Answer to grade: {text}

It is right if it says what the right answer says, in whatever words, and nothing that contradicts
it. It is wrong if it says something else, only a part of it, or the same over and over.
Reply with one letter: A if it is right, B if it is wrong."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which could carry the key elsewhere."""

    def redirect_request(self, *args):
        return None


@dataclass(frozen=True)
class Judge:
    """A model that grades.

    Args:
        url: of the API, without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: its name there.

    Raises:
        UsageError: the URL is none, or would send a key unencrypted to another machine.
    """

    url: str
    model: str

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
        except ValueError:  # half an address of IPv6
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"judge: {self.url!r} is no URL such as http://localhost:8000/v1.")
        if parts.scheme == "http" and os.environ.get(KEY) and not _is_here(parts.hostname):
            raise UsageError(f"judge: {KEY} is set, and goes to another machine by https only.")

    def cost(self, written: Sequence[Written], kept) -> str:
        """Return how much there is to ask beyond what is kept, in words."""
        asked = [self._question(w) for w in self._missing(written, self._kept(kept))]
        tokens = sum(len(question) for question in asked) // 4
        return f"{counted(len(asked), 'request')} to {self.url}, of about {tokens:,} tokens in all"

    def grade(self, written: Sequence[Written], kept) -> list[Written]:
        """Return what was written with its grades.

        A reply that is not understood counts as wrong; a warning counts such replies.

        Args:
            kept: the file of answers, to which each is added as it comes.

        Raises:
            HorseError: the judge was not reached, or refused; the answers so far are kept.
        """
        answers = self._kept(kept)
        if Path(kept).exists():
            os.truncate(kept, len(_whole_lines(kept).encode()))
        with open(kept, "a", encoding="utf-8") as file:
            for w in self._missing(written, answers):
                answers[self._name(w)] = answer = self._ask(self._question(w))
                line = {"id": self._name(w), "prompt": w.prompt, "wanted": w.wanted}
                line |= {"text": w.text, "judge": self.model, "answer": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
        grades = [_grade(answers[self._name(w)]) for w in written]
        if unclear := grades.count(None):
            warnings.warn(
                f"judge: {unclear} of {len(grades)} replies hold no A and no B, and count as "
                f"wrong; {kept} has them.",
                stacklevel=2,
            )
        return [replace(w, judged=g == "A") for w, g in zip(written, grades, strict=True)]

    def _question(self, w: Written) -> str:
        wanted = ", or as well: ".join((w.wanted, *w.accepted))
        return QUESTION.format(prompt=w.prompt, wanted=wanted, text=w.text)

    def _name(self, w: Written) -> str:
        return json_digest([self.model, self._question(w)], 32)

    def _missing(self, written: Sequence[Written], answers: dict[str, str]) -> list[Written]:
        """Return those to ask about, each once."""
        return list({self._name(w): w for w in written if self._name(w) not in answers}.values())

    def _kept(self, path) -> dict[str, str]:
        if not Path(path).exists():
            return {}
        try:
            lines = [json.loads(x) for x in _whole_lines(path).split("\n") if x]
            return {str(line["id"]): str(line["answer"]) for line in lines}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise HorseError(f"{path}: damaged, or no answers ({first_line(error)}).") from None

    def _ask(self, question: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        body |= {"temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        url, data = f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise HorseError(
                f"judge: {self.url} gave no answer ({first_line(error)}). What it answered so far "
                f"is kept; {KEY} is where a key goes."
            ) from None


def _whole_lines(path) -> str:
    """Return the lines of a file, without a last one that was being written at a stop."""
    text = read_text(path)
    return text[: text.rfind("\n") + 1]


def _grade(answer: str) -> str | None:
    """Return the first letter A or B that stands alone in a reply, or None.

    Small letters count where nothing else is there: ``a`` is a word, too.
    """
    found = re.search(r"\b([AB])\b", answer) or re.fullmatch(r"\W*([ab])\W*", answer)
    return found and found[1].upper()


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
