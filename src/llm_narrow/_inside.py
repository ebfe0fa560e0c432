"""What runs inside a box of the sandbox: it locks itself in, then runs a candidate or its judge.

    keeper      makes the namespaces, and waits
    └ first     process 1 of the box: builds its file system, watches its memory, ends it
      └ worker  nobody, without any right: `candidate` or `judge`

`sandbox` starts this file as a script and sends it a line of JSON. Each protection is tried; what
holds, and why another does not, is told before the first line of a program runs.
"""

import builtins
import ctypes
import importlib
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY, NEW_USER = 65534, 0x10000000
NAMESPACES = {"files": 17, "host": 26, "ipc": 27, "processes": 29, "network": 30}  # bits
MOUNT_SETATTR = 442  # on every architecture
BIND, PRIVATE, DETACH = 0x1000 | 0x4000, 0x40000 | 0x4000, 2  # with all that is mounted below
SAFE, LOCKED = 2 | 4, 1 | 2 | 4  # no set-user-id, no devices; and read-only
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS, AMBIENT = 1, 4, 22, 24, 38, 47
EVERY, MOST = 0.02, 1 << 23  # seconds between looks at the memory; bytes of one answer
Given = dict[str, Any]
# How plain data that JSON has not is written: by a letter and the items, or the parts.
SHAPES: dict[str, Any] = {"l": list, "t": tuple, "s": set, "f": frozenset}
ATOMS: dict[str, tuple[Any, Callable[..., Any], Callable[[Any], Any]]] = {
    "b": (bytes | bytearray, bytes.fromhex, lambda v: [v.hex()]),
    "c": (complex, complex, lambda v: [v.real, v.imag]),
    "D": (Decimal, Decimal, lambda v: [str(v)]),
    "F": (Fraction, Fraction, lambda v: [str(v)]),
    "i": (int, lambda text: int(text, 16), lambda v: [hex(v)]),
    "r": (range, range, lambda v: [v.start, v.stop, v.step]),
}


def main() -> None:
    """Be the keeper, the first process and the worker, one after the other."""
    given: Given = json.loads(sys.stdin.buffer.readline())
    held: dict[str, str] = {}  # protection: why it does not hold, or nothing
    _prctl(PDEATHSIG, signal.SIGKILL)
    _attempt("user", lambda: _new_user(given), given, held)
    for name, bit in NAMESPACES.items():
        _attempt(name, partial(_libc, "unshare", 1 << bit), given, held)
    if first := os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        os.waitpid(first, 0)
        os._exit(0)
    _prctl(PDEATHSIG, signal.SIGKILL)
    _prctl(DUMPABLE, 0)  # the worker may be of the same user, and shall not look into this process
    if not held["files"]:
        _attempt("files", lambda: _build_root(given), given, held)
    _attempt("memory", lambda: _memory(os.getpid()), given, held)
    if held["files"] or held["processes"]:
        held["memory"] = "needs processes and files of its own"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    if worker := os.fork():
        end = _watch(worker, given["memory"], not held["memory"])
        os.write(given["status"], json.dumps({"end": end}).encode() + b"\n")
        if held["processes"]:
            os.killpg(0, signal.SIGKILL)  # the best that can be done: the group, if not the box
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    _lock_in(given, held)
    os.write(given["status"], json.dumps({"held": held}).encode() + b"\n")
    if not any(held[name] for name in given["required"]):
        os.close(given["status"])
        line = _Line(os.fdopen(given["pipes"][0], "rb"), os.fdopen(given["pipes"][1], "wb"))
        (candidate if given["role"] == "candidate" else judge)(given, line)
    os._exit(0)


def _attempt(name: str, act: Callable[[], object], given: Given, held: dict[str, str]) -> None:
    held[name] = "switched off"
    if name not in given["without"]:
        try:
            act()
            held[name] = ""
        except OSError as error:
            held[name] = error.strerror or str(error)


def _libc(name: str, *arguments: object) -> None:
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _prctl(option: int, *values: int | bytes) -> None:
    filled = [*values, 0, 0, 0, 0][:4]
    _libc("prctl", option, *(ctypes.c_ulong(v) if isinstance(v, int) else v for v in filled))


def _new_user(given: Given) -> None:
    """A user namespace, whose users are mapped from outside, as nobody may do for himself."""
    _libc("unshare", NEW_USER)
    os.write(given["status"], b'{"map": true}\n')
    if sys.stdin.buffer.readline() != b"mapped\n":
        raise OSError("the users cannot be mapped")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    text = [name.encode() for name in (source, target, kind, options)]
    _libc("mount", *text[:3], ctypes.c_ulong(flags), text[3])


def _set_mount(target: str, attributes: int, *, below: bool) -> None:
    """Set attributes of a mount and, if so wanted, of all below it."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    how, size = ctypes.c_long(0x8000 if below else 0), ctypes.c_long(ctypes.sizeof(wanted))
    here = ctypes.c_long(MOUNT_SETATTR), ctypes.c_long(-100), target.encode()
    _libc("syscall", *here, how, wanted, size)


def _build_root(given: Given) -> None:
    """A root of nothing but what is listed, read-only, and an empty /tmp of limited size."""
    _mount("none", "/", "", PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", SAFE, "mode=755,size=1m")
    _set_mount("/tmp", SAFE, below=False)  # an old kernel refuses here, with nothing changed
    os.mkdir("/tmp/old")
    _libc("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for target, source in given["paths"]:
        os.makedirs(target, exist_ok=True)
        _mount(f"/old{source}", target, "", BIND)
        _set_mount(target, LOCKED, below=True)
    os.mkdir("/dev")
    for name in ("null", "zero", "full", "random", "urandom"):
        Path(f"/dev/{name}").touch()
        _mount(f"/old/dev/{name}", f"/dev/{name}", "", BIND)
    os.mkdir("/proc")
    with suppress(OSError):  # some containers refuse it: then there is none, and no memory watch
        _mount("proc", "/proc", "proc", SAFE, "subset=pid")
    os.mkdir("/tmp")
    _mount("tmpfs", "/tmp", "tmpfs", SAFE, f"mode=1777,size={given['folder']},nr_inodes=4096")
    _libc("umount2", b"/old", DETACH)
    os.rmdir("/old")
    _set_mount("/", LOCKED, below=False)
    os.chdir("/tmp")


def _lock_in(given: Given, held: dict[str, str]) -> None:
    """Give up every right that the worker has left, for ever, and all files but its own."""
    if not held["processes"]:
        os.setsid()  # else the group is all that can be killed at the end
    _attempt("limits", lambda: _limit(given), given, held)
    _attempt("capabilities", _be_nobody, given, held)
    _attempt("privileges", lambda: _prctl(NO_NEW_PRIVS, 1), given, held)
    _attempt("calls", lambda: _refuse_calls(bytes.fromhex(given["calls"])), given, held)
    # What changed its user is closed to the watcher too, which has to read how much memory it has.
    _prctl(DUMPABLE, 1 if given["role"] == "candidate" else 0)
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0,) if given["role"] == "candidate" else (0, 1, 2):
        os.dup2(nothing, number)
    keep = sorted({0, 1, 2, given["status"], *given["pipes"]})
    for low, high in zip(keep, [*keep[1:], 1 << 16], strict=True):
        os.closerange(low + 1, high)


def _limit(given: Given) -> None:
    for name, most in given["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))


def _be_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
    for number in range(64):
        with suppress(OSError):  # a number that this kernel does not have, or no right to drop it
            _prctl(CAPBSET_DROP, number)
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _prctl(AMBIENT, 4)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _libc("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _refuse_calls(program: bytes) -> None:
    place = ctypes.addressof(code := ctypes.create_string_buffer(program))
    _prctl(SECCOMP, 2, struct.pack("@HP", len(code) // 8, place))


def _memory(process: int) -> int:
    """Bytes that the process takes; pages that it shares count in part, where that is told."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def _watch(worker: int, most: int, watching: bool) -> dict[str, Any]:
    """Wait for the worker, burying what it left; or until the box takes too much memory."""
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, EVERY)
        with suppress(ChildProcessError):
            while True:
                process, status, used = os.wait4(-1, os.WNOHANG)
                if process == worker:
                    code, cpu = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
                    return {"code": code, "cpu": cpu}
                if process == 0:
                    break
        taken = 0
        for name in os.listdir("/proc") if watching else []:
            if name.isdigit() and name != "1":
                with suppress(OSError, IndexError):  # it ended while we looked
                    taken += _memory(int(name))
        if taken > most:
            return {"memory": taken}


def encode(value: Any, other: Callable[[Any], list[Any]]) -> Any:
    """JSON for plain data, exact and of exactly the built-in types; `other` says the rest."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else ["i", hex(value)]
    if isinstance(value, dict):
        return ["d", *([encode(k, other), encode(v, other)] for k, v in value.items())]
    for letter, kind in SHAPES.items():
        if isinstance(value, kind):
            return [letter, *(encode(item, other) for item in value)]
    for letter, (kind, _, parts) in ATOMS.items():
        if isinstance(value, kind):
            return [letter, *parts(value)]
    return other(value)


def decode(data: Any, other: Callable[[int], Any]) -> Any:
    """What `encode` said; `other` finds what is no plain data by its number."""
    if not isinstance(data, list):
        return data
    letter, *rest = data
    if letter == "o":
        return other(rest[0])
    if letter == "d":
        return {decode(k, other): decode(v, other) for k, v in rest}
    if letter in SHAPES:
        return SHAPES[letter](decode(item, other) for item in rest)
    return ATOMS[letter][1](*rest)


def candidate(given: Given, line: "_Line") -> None:
    """Run the program, then do what the judge asks; answers are data, or say that it raised."""
    module = types.ModuleType("program")
    sys.modules["program"], sys.argv = module, ["program"]
    objects: list[Any] = []

    def remember(value: Any) -> list[Any]:
        objects.append(value)
        return ["o", len(objects) - 1]

    def do(what: str, thing: Any, *more: Any) -> Any:
        if what == "run":
            return exec(compile(thing, "<program>", "exec"), module.__dict__)
        if what == "name":
            return getattr(module, thing)
        if what == "call":
            return thing(*more[0], **more[1])
        return getattr(builtins, what)(thing, *more)

    asked: Any = ["run", given["program"]]
    while True:
        try:
            answer = json.dumps(["value", encode(do(*asked), remember)])
        except BaseException as error:
            said = str(error)[:300] if isinstance(error, Exception) else ""
            names = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
            answer = json.dumps(["raise", names[0], said])
        line.say(answer)
        if not (text := line.source.readline()):
            return
        asked = decode(json.loads(text), objects.__getitem__)


class _Gone(BaseException):
    """The candidate gave no answer that can be read; tests cannot catch it as an Exception."""


class _Line:
    """Between the judge and the candidate. Once the judge has lost it, nothing passes."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self.source, self.sink, self.lost = source, sink, False

    def ask(self, *request: Any, closed: bool | None = False) -> Any:
        self.say(json.dumps(encode(list(request), _number)))
        return self.hear(closed)

    def say(self, text: str) -> None:
        with suppress(OSError):  # nobody there any more: there is no answer either
            self.sink.write(text.encode() + b"\n")
            self.sink.flush()

    def hear(self, closed: bool | None = False) -> Any:
        """The next answer: data or a Remote; raises what the candidate raised, if an Exception."""
        try:
            text = self.source.readline(MOST)
            if not text.endswith(b"\n"):
                raise ValueError("its answer is too long" if text else "it ended unanswered")
            kind, *rest = json.loads(text)
            if kind == "value":
                return decode(rest[0], lambda number: _Remote(self, number, closed))
            name, said = str(rest[0]), str(rest[1])[:300]
        except Exception as error:
            self.lost = True
            raise _Gone(str(error)) from error
        found = vars(builtins).get(name, RuntimeError)
        if not (isinstance(found, type) and issubclass(found, Exception)):
            raise _Gone(f"{name}: {said}")  # SystemExit and the like, which `except` lets through
        try:
            raised = found(said)
        except TypeError:  # some cannot be made of a text alone
            raised = RuntimeError(f"{name}: {said}")
        # StopIteration would end a loop of the tests early, as if all of it had been well.
        raise RuntimeError(name) if isinstance(raised, StopIteration) else raised


class _Remote:
    """Something of the candidate's that is no plain data. It can be used; it equals nothing.

    What the entry point (closed: None) returned is closed: were its methods called,
    `result.startswith("ab")` would tell the candidate what is expected, and let it answer.
    """

    __slots__ = ("_closed", "_line", "_number")

    def __init__(self, line: _Line, number: int, closed: bool | None) -> None:
        for name, value in zip(self.__slots__, (closed, line, number), strict=True):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self._closed is True:
            raise TypeError("what the candidate returned is no plain data, and is not called")
        return self._line.ask("call", self, list(args), named, closed=self._closed is None)

    def __getattr__(self, name: str) -> Any:
        return self._line.ask("getattr", self, name, closed=self._closed is not False)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._line.ask("list", self, closed=self._closed is True))


def _number(value: Any) -> list[Any]:
    if not isinstance(value, _Remote):
        raise TypeError(f"the tests pass a {type(value).__name__}, which is no plain data")
    return ["o", value._number]


class _Space(dict[str, Any]):
    """The tests' names. What nobody defined is a module of the library, or the candidate's."""

    line: _Line

    def __missing__(self, name: str) -> Any:
        if name in vars(builtins):
            raise KeyError(name)
        if name in sys.stdlib_module_names:
            return importlib.import_module(name)
        return self.line.ask("name", name)


def judge(given: Given, line: _Line) -> None:
    """Run the tests here, where the candidate's code never is, and tell what came of them."""
    space = _Space(__name__="tests")
    space.line = line
    said = {"passed": True, "error": "", "detail": ""}
    try:
        line.hear()
        exec(compile(given["prelude"], "<prelude>", "exec"), space)
        if given["entry_point"]:  # it may bear the name of a built-in, or of a stub in the prelude
            space[given["entry_point"]] = line.ask("name", given["entry_point"], closed=None)
        exec(compile(given["tests"], "<tests>", "exec"), space)
    except BaseException as error:
        text = str(error).splitlines()[0][:300] if str(error) else ""
        said = {"passed": False, "error": type(error).__name__.lstrip("_"), "detail": text}
    said["passed"] = said["passed"] and not line.lost
    os.write(given["pipes"][2], json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main()
