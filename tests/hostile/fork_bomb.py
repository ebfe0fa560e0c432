# ruff: noqa
"""Make children without end (here: until 100, each of which sleeps)."""
import os, time

made = 0
while made < 100:
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        time.sleep(30)
        os._exit(0)
    made += 1
if made == 100:
    print("ESCAPED")
