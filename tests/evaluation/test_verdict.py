"""The verdict: levels at their limits, and a sentence with the figures that it is made of."""

import json
import math

import pytest

from horse_plugin.evaluation.verdict import LESS_HARM, MORE_FACTS, judge
from horse_plugin.storage.files import to_json

BEFORE = {"efficacy": 4.0, "written": 1.0, "locality": 100.0, "drift": 0.0, "perplexity": 42.0}
BEFORE |= {"fluency": 4.0}
GOOD = {"efficacy": 99.0, "written": 98.5, "locality": 81.3, "drift": 0.03, "perplexity": 44.1}
GOOD |= {"fluency": 3.9}


def figures(**after):
    return {"before": BEFORE, "after": GOOD | after, "held": [197, 200], "kept": [31, 40]}


def test_a_good_edit_is_said_in_one_sentence_with_its_figures():
    found = judge(figures())
    assert found.sentence == (
        "197 of 200 facts hold; the unrelated answers of 31 of 40 facts stay; ordinary text: "
        "perplexity 42.0 → 44.1, drift 0.030. The model is unharmed."
    )
    assert (found.level, found.advice) == ("good", [])


def test_a_model_that_repeats_itself_is_told_so():
    assert (
        "; the model repeats itself: fluency 4.00 → 3.30. The"
        in judge(figures(fluency=3.3)).sentence
    )


def test_without_a_perplexity_before_it_says_the_one_after():
    found = judge({"before": {}, "after": GOOD})
    assert "ordinary text: perplexity 44.1, drift 0.030." in found.sentence


@pytest.mark.parametrize(
    ("after", "facts", "model"),
    [
        ({"written": 95}, "good", "good"),
        ({"written": 94.9}, "fair", "good"),
        ({"written": 79.9}, "bad", "good"),
        ({"locality": 70, "drift": 0.1, "perplexity": 46.1, "fluency": 3.41}, "good", "good"),
        ({"locality": 69}, "good", "fair"),
        ({"locality": 29}, "good", "bad"),
        ({"drift": 0.11}, "good", "fair"),
        ({"drift": 0.31}, "good", "bad"),
        ({"perplexity": 46.3}, "good", "fair"),
        ({"perplexity": 50.5}, "good", "bad"),
        ({"fluency": 3.3}, "good", "fair"),
        ({"fluency": 2.3, "written": 90}, "fair", "bad"),
        ({"fluency": 9.0, "perplexity": 20.0}, "good", "good"),  # better is no harm
        ({"locality": None}, "good", "good"),  # not measured
    ],
)
def test_levels_change_at_the_documented_limits(after, facts, model):
    found = judge(figures(**after))
    assert (found.facts, found.model) == (facts, model)
    assert found.level == max(facts, model, key=["good", "fair", "bad"].index)
    assert (MORE_FACTS in found.advice, LESS_HARM in found.advice) == (
        facts != "good",
        model != "good",
    )


@pytest.mark.parametrize(
    "after",
    [
        {"drift": math.nan, "perplexity": math.nan},
        {"drift": math.inf, "perplexity": 50.0},
        {"drift": 0.03, "perplexity": math.inf},
    ],
)
def test_a_model_that_is_not_finite_is_damaged_before_it_is_saved_and_after(after):
    found = judge(figures(**after))
    assert found.level == "bad" and "not finite" in found.sentence
    assert judge(json.loads(to_json(figures(**after)))) == found


def test_an_edit_whose_drift_was_never_measured_is_no_worse_for_it():
    unknown = {"drift": None, "perplexity": None}
    found = judge({"before": BEFORE | unknown, "after": GOOD | unknown})
    assert (found.level, "ordinary text" in found.sentence) == ("good", False)


def test_an_edit_of_an_earlier_release_is_judged_by_what_it_has():
    old = {"efficacy": 100.0, "generalization": 40.0, "locality": 9.0, "perplexity": 550.0}
    found = judge({"before": {"perplexity": 42.0}, "after": old})
    assert found.sentence == (
        "100.0 percent of the answers hold; 9.0 percent of the unrelated answers stay; "
        "ordinary text: perplexity 42.0 → 550.0. The model is damaged."
    )
