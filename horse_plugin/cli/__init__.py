"""The ``horse`` command: it parses and prints, and computes nothing.

    main       the entry point: one line on an error
    preparing  the commands before an edit: init, convert-hparams, train, stats
    changing   edit, undo, redo, log, show, report, export, push, pull
    using      ask, play
    measuring  eval, compare, ablate, general, demo, bench
    app        what holds the commands, and what they print to
    options    options that several commands have
    show       tables for the terminal
    asking     questions to the model, once or in a conversation
    play       a page in the browser, with a switch for each edit
    console    text on the terminal, which shows as it is written

This package may import everything.
"""
