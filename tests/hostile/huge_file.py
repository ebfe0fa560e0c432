# ruff: noqa
"""Write one file that is larger than is allowed."""
with open("huge", "wb") as file:
    for _ in range(24):
        file.write(bytes(1 << 20))
print("ESCAPED")
