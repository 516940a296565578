"""How a model is asked: where a prompt ends and its answer begins, and chat templates."""

import re
import unicodedata
from dataclasses import dataclass, fields

from horse_plugin.errors import UsageError, first_line

# No space stands after a prompt that ends so, nor before an answer that begins so.
OPENING = "([{<“‘«‹„‚「『【（《〈/\\@_¿¡"
ENDS_OPEN = re.compile(
    rf"""(?: \s | [{re.escape(OPENING)}]
    | [\w)\]](?:[-–—=]|::|->)                         # joins what stands beside it
    | (?<!\d)(?<!\d\s)[$£€¥]                         # stands before its number
    | <[|｜][^<>]*[|｜]> | (?<!\w)</?\w[^<>]*>       # a tag, or what a chat marks its turns with
    )$""",
    re.VERBOSE,
)
# An apostrophe begins names, too: a hyphen tells 's-Hertogenbosch, and 't ends words in n only.
BEGINS_CLOSED = re.compile(
    r"[,;?)\]}”’»›]|!(?![=\w])|[.:](?!\w)|'(?:re|ve|ll|d|m)\b|'s\b(?!-)|(?<=n)'t\b|n't\b"
)
WITHIN_NUMBER = re.compile(r"\d(?:%|\.\d)$")
CODE = re.compile(r"[={}_]|\w[(\[]")
# Scripts without spaces between words, as Unicode names their characters.
WITHOUT_SPACES = """CJK HIRAGANA KATAKANA BOPOMOFO IDEOGRAPHIC FULLWIDTH HALFWIDTH THAI LAO KHMER
    MYANMAR TIBETAN JAVANESE BALINESE TAI YI""".split()


@dataclass(frozen=True)
class Seam:
    """How prompts are put to a model, and how answers follow them.

    Attributes:
        separator: what stands between prompt and answer; None is a space between words and nothing
            elsewhere, as :func:`join` has it.
        chat_template: whether the prompt is a user's turn, in the tokenizer's chat template.
        system_prompt: what the chat's system turn says; None leaves it to the template.
        append_eos: whether the tokenizer's EOS token belongs to each answer.
    """

    separator: str | None = None
    chat_template: bool = False
    system_prompt: str | None = None
    append_eos: bool = False

    @classmethod
    def of(cls, hparams) -> "Seam":
        """Return what the hparams say."""
        return cls(**{f.name: getattr(hparams, f.name) for f in fields(cls)})

    def ask(self, tokenizer, prompt: str) -> str:
        """Return the text that the model reads before the answer."""
        if self.chat_template:
            return self._chat(tokenizer, prompt)
        return prompt if self.separator is not None else _split(prompt, "")[0]

    def upto(self, tokenizer, prompt: str, end: int) -> str:
        """Return the text that the model reads up to a character of the prompt.

        In a chat, a mark in the prompt's place says where that lies; templates may trim the prompt.
        """
        if not self.chat_template:
            return prompt[:end]
        mark = "¤¤"
        before = self._chat(tokenizer, mark).partition(mark)[0]
        asked = self._chat(tokenizer, prompt)
        trimmed = 0 if asked.startswith(before + prompt) else len(prompt) - len(prompt.lstrip())
        return asked[: len(before) + end - trimmed]

    def join(self, tokenizer, prompt: str, answer: str) -> tuple[str, int]:
        """Return the text of prompt and answer, and the number of its characters before the answer.

        Raises:
            UsageError: there is no chat template, or no EOS token, where one is wanted.
        """
        if self.chat_template:
            asked = self._chat(tokenizer, prompt)
            gap = self._gap(tokenizer, prompt, asked)
            start, text = len(asked), asked + gap + answer.strip(" ")
        elif self.separator is not None:
            start, text = len(prompt), f"{prompt}{self.separator}{answer}"
        else:
            start, text = len(self.ask(tokenizer, prompt)), join(prompt, answer)
        if self.append_eos:
            if not tokenizer.eos_token:
                raise UsageError("append_eos: this tokenizer has no EOS token.")
            text = text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        return text, start

    def _chat(self, tokenizer, prompt: str, answer: str | None = None) -> str:
        """Return a chat up to where the answer begins, or with an answer."""
        turns = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise UsageError(
                f"chat_template: the tokenizer's template failed ({first_line(error)}). "
                "An instruct model's tokenizer has one; set chat_template: false for others."
            ) from None

    def _gap(self, tokenizer, prompt: str, asked: str) -> str:
        """Return the white space that the template puts before an answer to what was asked."""
        mark = "Answer"
        whole = self._chat(tokenizer, prompt, mark)
        gap, found, _ = whole.removeprefix(asked).partition(mark)
        return gap if found and whole.startswith(asked) and gap.isspace() else ""


PLAIN = Seam()


def join(prompt: str, answer: str) -> str:
    """Return a prompt and its answer as one text.

    White space that either of them has at the seam stays, though spaces are one. Where there is
    none, a space separates words. Nothing stands after an opening bracket or quote, a slash or a
    dot within code, before closing marks, and beside scripts that are written without spaces.
    """
    head, gap, body = _split(prompt, answer)
    has_spaces = gap and not gap.strip(" ") and not head.endswith("\n")
    if has_spaces or (not gap and head and body and _are_words(head, body)):
        gap = " "
    return head + gap + body


def _split(prompt: str, answer: str) -> tuple[str, str, str]:
    """Return a prompt without its last spaces, the white space before its answer, and the rest."""
    head, body = prompt.rstrip(" "), answer.lstrip()
    if not head:
        head = prompt
    return head, prompt[len(head) :] + answer[: len(answer) - len(body)], body.rstrip(" ")


def _are_words(head: str, body: str) -> bool:
    """Return whether a space belongs between these texts, of which neither has one at the seam."""
    last, first = head[-1], body[0]
    if ENDS_OPEN.search(head) or BEGINS_CLOSED.match(last + body, 1):
        return False
    if WITHIN_NUMBER.search(head[-2:] + first) or (last == "." and _is_code(head)):
        return False
    if last in "\"'`" and (len(head) == 1 or head[-2].isspace() or head[-2] in OPENING):
        return False  # it opens a quotation
    return not (is_without_spaces(last) or is_without_spaces(first))


def _is_code(head: str) -> bool:
    """Return whether the dot that ends a text leads to a part of what it follows.

    It ends a sentence or an abbreviation otherwise.
    """
    *before, word = head.split()
    parts = word[:-1].split(".")
    if not parts[-1]:
        return False  # more than one dot
    dotted = len(parts) > 1 and len(parts[-1]) > 1
    return dotted or not before or bool(CODE.search(head))


def is_without_spaces(character: str) -> bool:
    """Return whether a character is of a script that puts no spaces between words."""
    if "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uffef":
        return True  # their punctuation
    return unicodedata.name(character, "").partition(" ")[0] in WITHOUT_SPACES
