"""Errors that a user sees as one line, and the exit codes that go with them."""

import functools
import os
import sys

import torch


class InputError(ValueError):
    """The user gave something that cannot be used; the message is the one line that is shown."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))  # of libraries it may have several lines


class Stopped(Exception):
    """A run ended early: the one line that is shown, and the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def one_line_errors(script: str):
    """Decorate a script's main function: its errors become one line and the exit code."""

    def decorate(main):
        @functools.wraps(main)
        def wrapper(argv: list[str] | None = None) -> int:
            try:
                main(sys.argv[1:] if argv is None else argv)
                return 0
            except (InputError, Stopped) as error:
                line, code = error, getattr(error, "code", 2)
            except torch.OutOfMemoryError:
                line, code = "out of memory: raise train.accumulation_steps or lower the batch", 1
            except KeyboardInterrupt:
                line, code = "stopped by SIGINT", 130
            if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
                print(f"{script}: {line}", file=sys.stderr)
            return code

        return wrapper

    return decorate
