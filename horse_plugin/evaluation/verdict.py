"""A verdict on an edit, in words: do the facts hold, and is the model still what it was?

The limits are ours. They were set beside what edited models write: up to the first one of each pair
nobody would notice the edit in ordinary text, and beyond the second one anybody does.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from horse_plugin.evaluation.metrics import COST
from horse_plugin.evaluation.tables import figure, number

GOOD, FAIR, BAD = LEVELS = ("good", "fair", "bad")
# What is measured → (least of good, least of fair), in percent.
AT_LEAST = {
    "held": (95, 80),  # facts whose whole answer the model gives
    "locality": (70, 30),  # tokens on unrelated prompts that stayed
}
# What is measured → (most of good, most of fair).
AT_MOST = {
    "drift": (0.1, 0.3),  # of held-out text from the unedited model, nats a token
    "rise": (10, 20),  # of its perplexity, percent
    "repetition": (15, 40),  # fall of the fluency of what the model writes, percent
}
HARM = {GOOD: "unharmed", FAIR: "somewhat changed", BAD: "damaged"}
MORE_FACTS = "To hold more facts, try a trained archive, more edit_sweeps or a smaller edit_ridge."
LESS_HARM = "To spare the model, try a trained archive, max_drift: 0.05 or fewer facts."


@dataclass(frozen=True)
class Verdict:
    """What an edit came to.

    Attributes:
        facts: the level of what it holds: ``good``, ``fair`` or ``bad``; None is of no facts.
        model: the level of what it left of the model.
        sentence: both with their figures, in one sentence.
        advice: what to do where a level is not good.
    """

    facts: str | None
    model: str
    sentence: str
    advice: list[str]

    @property
    def level(self) -> str:
        """The worse one of the two levels."""
        return worst([self.facts or GOOD, self.model])

    def to_dict(self) -> dict:
        return asdict(self)


def judge(figures: Mapping) -> Verdict:
    """Return the verdict on the figures of an edit, as ``edit.json`` has them.

    Args:
        figures: the summaries ``before`` and ``after``; ``held`` and ``kept``, the numbers of facts
            whose answers the model gives and whose unrelated answers stayed, each with the number
            of facts that were measured. Edits of earlier releases have neither.
    """
    before, after = figures["before"], figures["after"]
    wrecked = [name for name in COST if _is_not_finite(before.get(name), after.get(name))]
    after = {name: value for name, value in after.items() if name not in wrecked}
    measured = {
        "held": after["efficacy"] if after.get("written") is None else after["written"],
        "locality": after.get("locality"),
        "drift": after.get("drift"),
        "rise": rise(before.get("perplexity"), after.get("perplexity")),
        "repetition": -(rise(before.get("fluency"), after.get("fluency")) or 0),
    }
    levels = {name: level_of(name, value) for name, value in measured.items() if value is not None}
    levels |= dict.fromkeys(wrecked, BAD)
    facts = levels.pop("held")
    model = worst(levels.values())
    held, kept = figures.get("held"), figures.get("kept")
    parts = [f"{held[0]:,} of {held[1]:,}" if held else f"{number(measured['held'])} percent"]
    parts[0] += " facts hold" if held else " of the answers hold"
    if kept and kept[1]:
        parts.append(f"the unrelated answers of {kept[0]:,} of {kept[1]:,} facts stay")
    elif "locality" in levels:
        parts.append(f"{number(measured['locality'])} percent of the unrelated answers stay")
    text = [f"{name} not finite" for name in wrecked]
    if after.get("perplexity") is not None:
        text.append(f"perplexity {_change('perplexity', before, after)}")
    if measured["drift"] is not None:
        text.append(f"drift {figure('drift', measured['drift'])}")
    if text:
        parts.append(f"ordinary text: {', '.join(text)}")
    if levels.get("repetition", GOOD) != GOOD:
        parts.append(f"the model repeats itself: fluency {_change('fluency', before, after)}")
    sentence = f"{'; '.join(parts)}. The model is {HARM[model]}."
    advice = [MORE_FACTS] * (facts != GOOD) + [LESS_HARM] * (model != GOOD)
    return Verdict(facts, model, sentence, advice)


def _is_not_finite(before: float | None, after: float | None) -> bool:
    """Return whether a figure of an edit is no finite number, for which files have null.

    A figure that was measured before the edit was measured after it, too.
    """
    return before is not None if after is None else not math.isfinite(after)


def _change(name: str, before: Mapping, after: Mapping) -> str:
    """Return a figure before and after, or after only where it was not measured before."""
    known = [of[name] for of in (before, after) if of.get(name) is not None]
    return " → ".join(figure(name, value) for value in known)


def rise(before: float | None, after: float | None) -> float | None:
    """Return how much a figure rose, in percent."""
    return None if None in (before, after) or before == 0 else 100 * (after / before - 1)


def worst(levels: Iterable[str]) -> str:
    """Return the worst of some levels."""
    return max(levels, key=LEVELS.index)


def level_of(name: str, value: float) -> str:
    """Return the level of a figure of :data:`AT_LEAST` or :data:`AT_MOST`."""
    if name in AT_LEAST:
        within = [value >= limit for limit in AT_LEAST[name]]
    else:
        within = [value <= limit for limit in AT_MOST[name]]
    return GOOD if within[0] else FAIR if within[1] else BAD
