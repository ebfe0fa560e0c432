# ruff: noqa
"""Raise what a test with `except` takes for a sign of its own."""


class Passed(BaseException):
    pass


def solve(x):
    raise Passed("passed")
