# ruff: noqa
"""Send something to a machine (here: this one)."""
import socket

with socket.create_connection(("127.0.0.1", GIVEN["port"]), timeout=2) as line:
    line.sendall(b"secret")
print("ESCAPED")
