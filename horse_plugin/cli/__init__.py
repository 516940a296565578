"""The ``horse`` command: it parses and prints, and computes nothing. Imports: everything."""
