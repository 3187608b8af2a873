"""Random cells of families, methods, batches and ways of running, against an oracle of its own.

`python -m tests.fuzz --cells 5000 --seed 1` runs many; `make test` runs a few hundred.
"""
