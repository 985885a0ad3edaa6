"""The commands of `ridfr`, a module each: `describe(parser)` adds the arguments, `run(options)` does the work.

Importing one is cheap; torch and the rest load in `run`.
"""
