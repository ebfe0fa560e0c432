# ruff: noqa
"""Overwrite a file, and leave a new one beside it."""
open(GIVEN["file"], "w").write("changed")
open(GIVEN["file"] + ".new", "w").write("left")
print("ESCAPED")
