# ruff: noqa
"""Talk to a service of this machine that has no file."""
import socket

with socket.socket(socket.AF_UNIX) as line:
    line.connect("\0" + GIVEN["socket"])
print("ESCAPED")
