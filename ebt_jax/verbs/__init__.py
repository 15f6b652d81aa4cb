"""The verbs of the command line: a file for each, with its flags and what it does."""
