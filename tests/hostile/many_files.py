# ruff: noqa
"""Fill the disk with files that are each within the limit."""
for number in range(40):
    with open(str(number), "wb") as file:
        file.write(bytes(1 << 20))
print("ESCAPED")
