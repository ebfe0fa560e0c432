# ruff: noqa
"""Read a file outside."""
if open(GIVEN["file"]).read() == "precious":
    print("ESCAPED")
