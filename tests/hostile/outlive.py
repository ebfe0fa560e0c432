# ruff: noqa
"""Leave a child behind that belongs to no group or terminal of ours."""
import ctypes, os, time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, GIVEN["name"].encode(), 0, 0, 0)
        for number in range(64):
            try:
                os.close(number)
            except OSError:
                pass
        time.sleep(20)
    os._exit(0)
time.sleep(0.5)
