"""Methods side by side, the ablation, the demo, timings.

    experiments   compare (Table 1, Fig. 2) and ablate (Table 2)
    plan          methods × models × data sets × numbers of edits × seeds
    runner        from a plan to rows of results.json, each measured once
    task          what a method gets, and what it gives back
    methods       the rows: a name and a runner each
    tables        rows of results.json as the paper's tables
    harness       the model `horse` of lm-evaluation-harness
    again         the report of a folder, drawn again
    output        what a comparison leaves in its folder
    demo          train on shipped facts, edit 200 others, report
    bench         where the time of an edit goes
    baselines/    EasyEdit's own methods

This package imports everything above it: ``easyedit`` in ``baselines`` only.
"""
