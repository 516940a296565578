"""The ``horse`` command: it parses and prints, and computes nothing.

    main     the commands and their options
    show     tables for the terminal
    asking   questions to the model, once or in a conversation
    play     a page in the browser, with a switch for each edit
    console  text on the terminal, which shows as it is written

This package may import everything.
"""
