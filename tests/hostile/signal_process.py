# ruff: noqa
"""End a process outside."""
import os

os.kill(GIVEN["process"], 9)
print("ESCAPED")
