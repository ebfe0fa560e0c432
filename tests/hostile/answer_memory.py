# ruff: noqa
"""Answer in a few bytes with what takes all memory when it is used."""


def solve(x):
    return range(10**15)
