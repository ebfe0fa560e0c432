# ruff: noqa
"""Delete a file that the user owns."""
import os

os.unlink(GIVEN["file"])
print("ESCAPED")
