"""Errors that a user sees as one line, the exit codes that go with them, and what is printed."""

import contextlib
import functools
import io
import os
import sys

# In the errors of Python and CUDA, of MPS, of torch's two allocators for CPUs, of cuDNN.
NO_MEMORY = "MemoryError", "out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED"


class InputError(ValueError):
    """The user gave something that cannot be used; the message is the one line that is shown."""

    def __init__(self, message: object, **notes):
        super().__init__(" ".join(str(message).split()))  # of libraries it may have several lines
        vars(self).update(notes)


class Stopped(Exception):
    """A run ended early: the one line that is shown, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def printable(text: object) -> str:
    """Return a text with escapes for control characters and for bytes that are no characters."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def say(text: object, file: io.TextIOBase | None = None) -> None:
    """Print what is printable of a text; to a closed pipe or a full disk nothing."""
    stream = sys.stdout if file is None else file
    try:
        print(printable(text), file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):  # what Python flushes at the end goes nowhere, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


say_once = functools.cache(say)


def one_line_errors(script: str):
    """Decorate a script's main function: its errors become one line and the exit code."""

    def decorate(main):
        @functools.wraps(main)
        def wrapper(argv: list[str] | None = None) -> int:
            if sys.stderr is None:  # closed, as by a daemon
                sys.stderr = io.StringIO()
            for stream in sys.stdout, sys.stderr:
                if isinstance(stream, io.TextIOWrapper):  # an old code page lacks characters
                    stream.reconfigure(errors="backslashreplace")
            try:
                main(sys.argv[1:] if argv is None else argv)
                return 0
            except (InputError, Stopped) as error:
                line, code = error, getattr(error, "code", 2)
            except (MemoryError, RuntimeError) as error:
                if not any(words in repr(error) for words in NO_MEMORY):
                    raise
                advice = "; in a new run, raise train.accumulation_steps or lower data.image_size"
                line, code = "out of memory" + (advice if script == "train.py" else ""), 1
            except OSError as error:
                if error.filename is None:  # nothing that the user named
                    raise
                line, code = InputError(f"{error.filename}: {error.strerror}", **vars(error)), 2
            except KeyboardInterrupt:
                line, code = "stopped by SIGINT", 130
            is_first = os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ
            if getattr(line, "speaks", is_first):  # of several processes one does
                say(f"{script}: {line}", sys.stderr)
            return code

        return wrapper

    return decorate
