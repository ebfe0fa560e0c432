# ruff: noqa
"""Unpack what is small when packed."""
import zlib

packer = zlib.compressobj(1)
packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
assert len(packed) < 4 << 20
unpacked = zlib.decompress(packed)
print("ESCAPED")
