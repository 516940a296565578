"""The ``horse`` command: it parses and prints, and computes nothing.

    main   the commands and their options
    show   tables for the terminal

This package may import everything.
"""
