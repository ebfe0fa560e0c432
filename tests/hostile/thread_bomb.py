# ruff: noqa
"""Make threads without end (here: until 200)."""
import threading, time

made = 0
try:
    while made < 200:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        made += 1
    print("ESCAPED")
except RuntimeError:
    pass
