"""Run code that a model wrote, where it can do no harm and cannot say for itself that it passed.

    verdict = run("def double(x): return 2 * x", "assert double(2) == 4", entry_point="double")

The program and its tests run in two boxes, which see nothing of each other: a pipe carries calls
to the program's box and plain data back. The judge's box alone holds the pipe that the verdict
comes by, so whatever the program does to its own Python, it can only answer questions.
See `_inside` for what a box is made of.
"""

import json
import os
import platform
import selectors
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

from .errors import BadInput, UnknownName

Kind = Literal["passed", "failed", "timed out", "out of memory", "too much output", "killed"]
INSIDE = Path(__file__).with_name("_inside.py")
# Protection: what it means. Those that are essential come first.
ESSENTIAL = MappingProxyType({
    "user": "a user of no rights outside, in a user namespace",
    "files": "read-only Python and system libraries, a private temporary folder, nothing else",
    "processes": "sees and signals no process but its own, all of which end with it",
    "network": "no network, not even the machine's own address",
    "capabilities": "none",
    "privileges": "none can be gained by running another program (no_new_privs)",
    "limits": "CPU time, memory, processes, file size and open files of each process",
})  # fmt: skip
FURTHER = MappingProxyType({
    "ipc": "no shared memory or queues of the machine",
    "host": "a host name of its own",
    "memory": "that of all its processes together is watched",
    "calls": "system calls that programs do not need are refused (seccomp)",
    "environment": "none of the variables of the calling process",
})  # fmt: skip
SYSTEM = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/nix/store")
# (x86-64, arm64) numbers of what looks into other processes, mounts, makes namespaces or memory
# that the limits do not count, or is seldom needed and often flawed.
CALLS = (
    (101, 117), (310, 270), (311, 271), (312, 272), (438, 438),  # ptrace … pidfd_getfd
    (165, 40), (166, 39), (155, 41), (161, 51), (428, 428), (429, 429), (430, 430), (432, 432),
    (442, 442), (304, 265),  # mount … mount_setattr, open_by_handle_at
    (272, 97), (308, 268),  # unshare, setns
    (319, 279), (447, 447), (29, 194), (64, 190), (68, 186), (240, 180),  # memfd, shm, sem, msg, mq
    (248, 217), (249, 218), (250, 219), (321, 280), (298, 241), (323, 282), (425, 425),  # keys, bpf
    (246, 104), (175, 105), (313, 273),  # kexec_load, modules
)  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, name, clone
CLONE3, ANY_NAMESPACE, NOBODY = 435, 0x7E020000, 65534
GRACE = 5.0  # seconds that a box may take to end once it was told to


@dataclass(frozen=True)
class Limits:
    """What a program may take. Memory and file sizes are in bytes, times in seconds.

    CPU time, memory and file size are those of each process; memory is that of all together too.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 40.0
    memory: int = 1 << 30
    processes: int = 16
    file_size: int = 16 << 20
    folder: int = 64 << 20
    open_files: int = 64
    output: int = 1 << 16

    def __post_init__(self) -> None:
        """Raise BadInput for a limit that is not positive."""
        for name, value in asdict(self).items():
            if not value > 0:
                raise BadInput(f"The limit {name} must be above 0, got {value}.")


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """What came of a program: `detail` is one line of why, `output` what it printed, cut."""

    kind: Kind
    detail: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all tests held."""
        return self.kind == "passed"


@dataclass(frozen=True)
class Protection:
    """One of the protections: whether it is active here, and if not, why."""

    name: str
    meaning: str
    essential: bool
    active: bool
    why_not: str = ""


@dataclass
class _Box:
    process: "subprocess.Popen[bytes]"
    status: IO[bytes]
    held: dict[str, str] | None = None  # protection: why it does not hold; None: not told yet
    end: dict[str, Any] = field(default_factory=dict)

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None  # a pipe, as asked for
        with suppress(BrokenPipeError):  # it ended at once, which is seen when it is heard
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def hear(self, told: Mapping[str, Any]) -> None:
        if "map" in told:
            self.say(_map_users(self.process.pid))
        self.held = told.get("held", self.held)
        self.end = told.get("end", self.end)

    def end_now(self) -> None:
        """End every process in the box, and wait until they have."""
        if self.held is not None and not self.held["processes"]:
            self.process.terminate()  # the keeper ends the first process, and all end with that
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class _Seen:
    """What has come out of the two boxes so far."""

    boxes: Mapping[str, _Box]
    verdict: dict[str, Any] | None = None
    output: bytes = b""
    kind: Kind | None = None  # why it was ended from here


def run(
    program: str,
    tests: str = "",
    *,
    entry_point: str = "",
    prelude: str = "",
    limits: Limits = LIMITS,
    allow_unsandboxed: bool = False,
    without: Collection[str] = (),
) -> Outcome:
    """Run the program, then the tests on what it defines; passed if all of them held.

    The tests run apart from the program. Names that they do not define are modules of the standard
    library or else the program's: functions take and return plain data (numbers, text, containers
    of it); other objects can be used but equal nothing. `prelude` is trusted code that runs before
    the tests, beside them. `entry_point` is the program's even if a built-in has that name.

    Without an essential protection nothing is run (BadInput), except with `allow_unsandboxed`.
    `without` switches protections off, to show what they are for.
    """
    _check_names(without)
    required = () if allow_unsandboxed else tuple(ESSENTIAL)
    started = time.monotonic()
    given = {"program": program, "tests": tests, "prelude": prelude, "entry_point": entry_point}
    seen = _both(given, limits, required, without)
    for box in seen.boxes.values():
        if lacking := {name: why for name, why in (box.held or {}).items() if why}:
            _refuse(lacking, required)
        if box.held is None and seen.kind is None:
            raise BadInput(
                f"The sandbox did not start: {seen.output[-300:].decode(errors='replace')!r}. "
                "Free memory or processes of this machine, and try again."
            )
    output = seen.output[: limits.output].decode(errors="replace")
    return Outcome(*_judged(seen, limits), output, time.monotonic() - started)


def protections(without: Collection[str] = ()) -> list[Protection]:
    """What protects this machine from a program, found out by running an empty one."""
    _check_names(without)
    empty = dict.fromkeys(("program", "tests", "prelude", "entry_point"), "")
    held = _both(empty, LIMITS, (), without).boxes["candidate"].held
    rows = []
    for name, meaning in {**ESSENTIAL, **FURTHER}.items():
        why = "the box did not start" if held is None else held[name]
        rows.append(Protection(name, meaning, name in ESSENTIAL, not why, why))
    return rows


def _check_names(without: Collection[str]) -> None:
    for name in without:
        if name not in {**ESSENTIAL, **FURTHER}:
            raise UnknownName("Protection", name, [*ESSENTIAL, *FURTHER])
    if not sys.platform.startswith("linux"):
        raise BadInput(
            f"Programs are run on Linux only, this is {sys.platform}: use a Linux machine, a "
            "virtual one or a container."
        )


def _refuse(lacking: Mapping[str, str], required: Collection[str]) -> None:
    if names := [f"{name} ({lacking[name]})" for name in required if name in lacking]:
        raise BadInput(
            f"The sandbox lacks {', '.join(names)} here, and runs nothing without. Allow user "
            "namespaces on this machine; or run with --allow-unsandboxed, on a machine where the "
            "code that a model wrote may do all that you can."
        )


def _judged(seen: _Seen, limits: Limits) -> tuple[Kind, str]:
    """The kind of outcome, and why. Only the judge's word makes it `passed`."""
    verdict = seen.verdict or {"passed": False, "error": "", "detail": "no verdict"}
    if verdict["passed"] and seen.kind is None:
        return "passed", ""
    if seen.kind == "timed out":
        return seen.kind, f"more than {limits.wall_seconds:g} s"
    if seen.kind == "too much output":
        return seen.kind, f"more than {limits.output} bytes"
    for box in seen.boxes.values():
        code, cpu = box.end.get("code", 0), box.end.get("cpu", 0.0)
        if "memory" in box.end or verdict["error"] == "MemoryError":
            return "out of memory", f"more than {limits.memory} bytes"
        if code < 0 and cpu >= limits.cpu_seconds * 0.9:
            return "timed out", f"more than {limits.cpu_seconds} s of CPU time"
        if code < 0:
            return "killed", signal.Signals(-code).name
    said = f"{verdict['error']}: {verdict['detail']}" if verdict["error"] else verdict["detail"]
    return "failed", said.removesuffix(": ")


def _both(
    given: Mapping[str, str],
    limits: Limits,
    required: Collection[str],
    without: Collection[str],
) -> _Seen:
    """Both boxes, from start to end. Nothing of them is left when this returns or raises."""
    calls = _filter()
    shared = {
        "required": list(required), "without": [*without, *([] if calls else ["calls"])],
        "limits": _numbers(limits), "memory": limits.memory, "folder": limits.folder,
        "paths": _paths(), "calls": calls.hex(),
    }  # fmt: skip
    with ExitStack() as stack:
        asked, answered, said = (stack.enter_context(_pipe()) for _ in range(3))
        program = {"program": given["program"], "role": "candidate", **shared}
        tests = {**given, "program": "", "role": "judge", **shared}
        candidate = stack.enter_context(_started(program, [asked[0], answered[1]]))
        judge = stack.enter_context(_started(tests, [answered[0], asked[1], said[1]]))
        seen = _Seen({"candidate": candidate, "judge": judge})
        _hear(seen, said[0], limits)
    for box in seen.boxes.values():
        if box.held is not None:
            box.held["environment"] = "switched off" if "environment" in without else ""
    return seen


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    ends = os.pipe()
    with (
        os.fdopen(ends[0], "rb", buffering=0) as out,
        os.fdopen(ends[1], "wb", buffering=0) as into,
    ):
        yield out, into


@contextmanager
def _started(about: Mapping[str, Any], used: list[IO[bytes]]) -> Iterator[_Box]:
    """A box, told what it needs; ended with all that is in it. `used` are closed here."""
    clean = {"LANG": "C.UTF-8", "HOME": "/tmp", "PATH": os.defpath, "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="llm-narrow-") as folder, _pipe() as (status, told):
        os.chmod(folder, 0o777)  # for nobody, where there is no other private folder
        files = [file.fileno() for file in (*used, told)]
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-u", str(INSIDE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **clean} if "environment" in about["without"] else clean,
            pass_fds=files, start_new_session=True,
        )  # fmt: skip
        for file in (*used, told):
            file.close()
        box = _Box(process, status)
        with process:
            try:
                sent = {**about, "pipes": files[:-1], "status": files[-1]}
                box.say(json.dumps(sent).encode() + b"\n")
                yield box
            finally:
                box.end_now()


def _hear(seen: _Seen, verdict: IO[bytes], limits: Limits) -> None:
    """Read all that comes out of the boxes, until there is a verdict, an end or a limit."""
    ends = time.monotonic() + limits.wall_seconds
    partial: dict[IO[bytes], bytes] = {verdict: b""}
    with selectors.DefaultSelector() as selector:
        selector.register(verdict, selectors.EVENT_READ, None)
        for box in seen.boxes.values():
            assert box.process.stdout is not None  # a pipe, as asked for
            selector.register(box.process.stdout, selectors.EVENT_READ, None)
            selector.register(box.status, selectors.EVENT_READ, box)
            partial[box.status] = b""
        over = False
        while seen.kind is None:
            # Once it is over, only what is already there is read: why a box ended is among it.
            ready = selector.select(0 if over else max(0.0, ends - time.monotonic()))
            if over and not ready:
                return
            for key, _ in ready:
                file: Any = key.fileobj
                data = os.read(file.fileno(), 1 << 16)
                if not data:
                    selector.unregister(file)
                elif file not in partial:
                    seen.output += data
                else:
                    *lines, partial[file] = (partial[file] + data).split(b"\n")
                    for line in lines:
                        if key.data is None:
                            seen.verdict = json.loads(line)
                        else:
                            key.data.hear(json.loads(line))
            still = selector.get_map()
            told = all(b.held is not None or b.status not in still for b in seen.boxes.values())
            over = seen.verdict is not None or (told and verdict not in still)
            if len(seen.output) > limits.output:
                seen.kind = "too much output"
            elif not over and time.monotonic() >= ends:
                seen.kind = "timed out"


def _map_users(process: int) -> bytes:
    """Map the users of a new namespace: nobody, and where we are root also root."""
    here, user, group = Path(f"/proc/{process}"), os.geteuid(), os.getegid()
    root = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
    try:
        if user != 0:
            (here / "setgroups").write_text("deny")
        (here / "uid_map").write_text(f"{NOBODY} {user} 1\n" if user else root)
        (here / "gid_map").write_text(f"{NOBODY} {group} 1\n" if user else root)
    except OSError:
        return b"refused\n"
    return b"mapped\n"


def _numbers(limits: Limits) -> dict[str, int]:
    """The limits of each process by the names that the system has for them."""
    return {
        "CPU": limits.cpu_seconds, "AS": limits.memory, "NPROC": limits.processes,
        "FSIZE": limits.file_size, "NOFILE": limits.open_files, "CORE": 0,
    }  # fmt: skip


def _paths() -> list[tuple[str, str]]:
    """What of the file system a program can read: where it is seen, and where it really is."""
    own = {sysconfig.get_path("stdlib"), f"{sys.base_exec_prefix}/{sys.platlibdir}"}
    return sorted((path, os.path.realpath(path)) for path in {*own, *SYSTEM} if Path(path).is_dir())


def _filter() -> bytes:
    """A seccomp program that refuses CALLS and new namespaces; empty where numbers are unknown."""
    if platform.machine() not in MACHINES:
        return b""
    column, machine, clone = MACHINES[platform.machine()]
    load, jump, more, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, unknown, kill, allow = 0x50001, 0x50026, 0x80000000, 0x7FFF0000
    steps = [  # code, steps if true, steps if false, value
        (load, 0, 0, 4), (jump, 1, 0, machine), (give, 0, 0, kill),
        (load, 0, 0, 0), (more, 0, 1, 0x40000000), (give, 0, 0, refuse),  # the 32-bit twins
        (jump, 0, 1, CLONE3), (give, 0, 0, unknown),  # its flags cannot be seen; clone's can
    ]  # fmt: skip
    for numbers in CALLS:
        steps += [(jump, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    steps += [
        (jump, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, ANY_NAMESPACE),
        (give, 0, 0, refuse), (give, 0, 0, allow),
    ]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
