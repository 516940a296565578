"""Facts, and their prompts as tokens.

    records   EditRecord: one fact to change, and the prompts that measure the change
    sources   files and hub data sets, as plain objects
    formats   from a plain object to a record, one function a format
    corpus    ordinary text, shipped or from a file or the hub
    seam      how a model is asked, and how an answer follows its prompt
    reader    a tokenizer that reads each text once, and many in one call
    prompts   records as tokens, and where each answer lies
    batches   prompts side by side, padded
    subjects  where the keys of a fact lie, and where its edit must do nothing

This package imports ``errors`` and ``assets`` only.
"""
