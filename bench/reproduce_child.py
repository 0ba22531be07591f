"""A command in a process of its own, which is told of this one's signals and ends with it."""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from infobatch_fast.errors import UserError, reason
from infobatch_fast.train.cli import Interrupted, Interrupts

CHECKOUT = Path(__file__).resolve().parents[1]
_LOOK = 0.2  # seconds within which a signal is passed on
_LAST = 200  # lines of output that are kept in memory
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: its exit code, or the negative number of the signal that killed it.
        output: its last lines.
    """

    code: int
    output: list[str]

    @property
    def why(self) -> str:
        """Why it failed, in one line: its last error, or the last that it said."""
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        said = [line for line in self.output if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        if errors:
            return reason(Exception(errors[-1].removeprefix("error: ")))
        last = said[-1] if said else "it said nothing"
        return f"{reason(Exception(last))} (exit code {self.code})"


def run_child(
    command: Sequence[str],
    interrupts: Interrupts,
    on_line: Callable[[str], None],
    log: Path | None = None,
) -> Ended:
    """Run a command to its end.

    Args:
        command: its words.
        interrupts: passed on: the first is waited for, a second ends the command at once.
        on_line: shown each line of its output, stderr included.
        log: its output is added to this file.

    Raises:
        Interrupted: by a signal, after the command ended.
        UserError: the log cannot be written.
    """
    try:
        kept = nullcontext() if log is None else open(log, "ab")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}") from None
    output: list[str] = []
    interrupts.deferred = True  # so that the command is not started and then lost
    process = None
    with kept as file:
        try:
            process = _start(command)
            told = False
            for line in _lines(process):
                if interrupts.received is not None and not told:
                    told = True
                    process.send_signal(interrupts.received)
                if line is None:
                    continue
                if file is not None:
                    file.write(line + b"\n")
                    file.flush()
                output = [*output[1 - _LAST :], line.decode(errors="replace")]
                on_line(output[-1])
            code = process.wait()
        except Interrupted as second:
            assert process is not None
            process.send_signal(second.number)
            process.wait()
            raise
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from None
        finally:
            interrupts.deferred = False
            if process is not None:
                _end(process)
    if interrupts.received is not None:
        raise Interrupted(interrupts.received, "stopped")
    return Ended(code, output)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start it in a group of its own: a Ctrl-C of the terminal would reach it twice otherwise."""
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
            if os.getppid() != parent:  # it died before that
                os._exit(128 + signal.SIGTERM)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        process_group=0,
        preexec_fn=end_with_parent,
    )


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """The lines of its output; None whenever there was none for a while."""
    assert process.stdout is not None
    number, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([number], [], [], _LOOK)[0]:
            if process.poll() is not None:  # what it left running may hold the pipe for hours
                break
            yield None
            continue
        chunk = os.read(number, 2**16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest
    while process.poll() is None:
        try:
            process.wait(_LOOK)
        except subprocess.TimeoutExpired:
            yield None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that it is gone; it may still save what it has."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
