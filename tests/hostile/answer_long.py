# ruff: noqa
"""Answer with more than the asking side has room for."""


def solve(x):
    return "x" * (64 << 20)
