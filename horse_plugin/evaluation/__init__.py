"""What an edit holds and what it costs, and how that is shown.

    metrics      efficacy, generalization, specificity, locality, portability
    drift        drift and perplexity of ordinary text
    generation   what the model writes, and its fluency
    general      general ability, by lm-evaluation-harness (Table 3)
    probability  CounterFact's success and magnitude
    written      answers in what the model writes: exact match and contains
    judge        a grade of each written answer, by a model at any URL
    facts        each fact's fate: rows of facts.csv
    verdict      an edit in words: do the facts hold, is the model still what it was
    results      rows of results.json
    tables       one table as Markdown, LaTeX or HTML
    charts       pictures; nothing else imports matplotlib
    report       one HTML file

This package imports ``model`` and what stands above it.
"""
