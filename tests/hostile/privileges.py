# ruff: noqa
"""Count on a program that runs as another user."""
import ctypes

if ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0:
    print("ESCAPED")
