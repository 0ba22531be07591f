"""What every command here does: read flags, say lines, stop on a signal, and end with one line."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

import tyro
from tqdm import tqdm

import infobatch_fast
from infobatch_fast.errors import UserError, reason

OptionsT = TypeVar("OptionsT")


class Interrupted(BaseException):
    """A signal ended the run; `number` is its own, `code` the exit code.

    No Exception, as KeyboardInterrupt is none: who expects any failure must not take it for one.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number, self.code = number, 128 + number


class Unheard(Exception):
    """The output takes no more lines."""


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP, taken over in a `with`: raised at once, or kept in `received`.

    Attributes:
        deferred: whether the first is kept, for a training step to end before it.
        received: its number, or 0.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received = 0

    def __enter__(self) -> "Interrupts":
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and not self.received:
            self.received = number
        else:
            raise Interrupted(number, "stopped at once; nothing more was written")


def command(
    body: Callable[[Interrupts], None],
    out_of_memory: str,
    tells: Callable[[], bool] = lambda: True,
) -> int:
    """Run a command's body and return the exit code; whatever ends it is told in one line.

    Args:
        body: gets the signals.
        out_of_memory: what to lower where memory ran out.
        tells: whether this process is the one to complain.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a folder's name in a terminal's ASCII
    try:
        with Interrupts() as interrupts:
            body(interrupts)
    except UserError as error:
        message, code = f"error: {error}", 2
    except Interrupted as stop:
        message, code = str(stop), stop.code
    except Unheard as error:
        if isinstance(error.__cause__, BrokenPipeError):  # of `| head`: not worth a word
            return 128 + signal.SIGPIPE
        message, code = f"error: cannot write the output: {error}", 2
    except PermissionError as error:  # of looking into a folder of another user
        message, code = f"error: cannot look at {error.filename}: {error.strerror}", 2
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # was killed: memory is short, or /dev/shm
            message, code = f"error: workers must live as long as the run, got {reason(error)}", 2
        elif is_out_of_memory(error):
            message, code = f"error: out of memory: {out_of_memory}", 2
        else:
            raise
    else:
        return 0
    return complain(message, code) if tells() else code


def say(line: str) -> None:
    """Print a line for the user, above a progress bar if there is one."""
    with _heard():
        tqdm.write(line, file=sys.stdout)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Raise Unheard if the output does not take what the block prints."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Keep Python from failing at it again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unheard(error.strerror) from error


def complain(message: str, code: int) -> int:
    """Print one line to stderr, whatever a path in it may hold, and return `code`."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    with contextlib.suppress(OSError):  # nowhere to complain
        print(plain, file=sys.stderr, flush=True)
    return code


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or the device's memory ran out."""
    # torch's own kind by its name, for commands without torch; the last sign is oneDNN's.
    signs = ("out of memory", "can't allocate memory", "could not create a primitive")
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(sign in str(error).lower() for sign in signs)


def parse(
    kind: type[OptionsT], arguments: Sequence[str], program: str, default: OptionsT
) -> OptionsT:
    """A dataclass, whose docstring is the help text, from the words after the program's name.

    Raises:
        UserError: a flag does not parse, in one line.
        SystemExit: with code 0 after --help and --version.
    """
    if "--version" in arguments:
        say(f"infobatch_fast {infobatch_fast.__version__}")
        raise SystemExit(0)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), _heard():
            return tyro.cli(kind, prog=program, args=list(arguments), default=default)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(_one_line(message.getvalue())) from None


def _one_line(box: str) -> str:
    """The words of tyro's framed error message, up to its second rule; ASCII's comes first."""
    words: list[str] = []
    rules = 0
    for framed in box.splitlines()[1:]:
        line = framed.strip("│╭╮╰╯ ")
        rule = line.startswith(("──", "----"))
        rules += rule and bool(words)
        if rules == 2 or line.startswith(("For full helptext", "Argument helptext")):
            break
        if not rule and not framed[1:].startswith(9 * " "):  # a flag's help
            words.append(line)
    text = " ".join(" ".join(words).split()) or "the command line does not parse"
    return text.removeprefix("Error parsing pruning: ")  # of a dataclass that checks itself
