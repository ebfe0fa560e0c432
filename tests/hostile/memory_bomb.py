# ruff: noqa
"""Take more memory than is allowed, at once."""
taken = bytearray(400 << 20)
taken[:: 4096] = b"x" * len(taken[:: 4096])
print("ESCAPED")
