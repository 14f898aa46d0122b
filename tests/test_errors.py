"""What a user sees of an error: one line, and the exit code."""

import sys

import pytest
import torch

from vit.errors import InputError, Stopped, one_line_errors


def test_the_message_of_an_input_error_is_one_line():
    for message, expected in (
        ("a.yaml: no such file", "a.yaml: no such file"),
        ("several\nlines,\r\n\ttabs   and\x0bother white space \n", None),
        (ValueError("an error\n  of a library"), "an error of a library"),
        (3, "3"),
        ("", ""),
    ):
        shown = str(InputError(message))
        assert shown == (expected or "several lines, tabs and other white space" * bool(message))
    assert issubclass(InputError, ValueError)


def run(error, argv=()):
    """Run a decorated script that raises an error, and return its exit code."""

    @one_line_errors("script.py")
    def main(given):
        assert given == list(argv)
        print("result")
        if error is not None:
            raise error

    return main(list(argv))


def test_every_error_of_a_user_is_one_line_and_an_exit_code(capsys):
    for error, code, line in (
        (InputError("a: wrong\nvalue"), 2, "a: wrong value"),
        (Stopped("the disk is full"), 1, "the disk is full"),
        (Stopped("stopped by SIGTERM; go on", code=143), 143, "stopped by SIGTERM; go on"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ):
        assert run(error, ("--a", "b")) == code
        assert capsys.readouterr() == ("result\n", f"script.py: {line}\n")


def test_a_device_without_enough_memory_is_told_what_helps(capsys):
    assert run(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) == 1
    out, err = capsys.readouterr()
    assert out == "result\n" and len(err.splitlines()) == 1
    for word in ("script.py: ", "memory", "train.accumulation_steps", "train.batch_size"):
        assert word in err


def test_a_script_without_errors_ends_with_0_and_prints_nothing_more(capsys):
    assert run(None) == 0
    assert capsys.readouterr() == ("result\n", "")


def test_an_error_of_the_program_keeps_its_traceback_and_help_its_exit():
    for error in (ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug"), SystemExit(0)):
        with pytest.raises(type(error)) as caught:
            run(error)
        assert caught.value is error


def test_a_script_reads_the_command_line_where_it_is_given_none(monkeypatch):
    seen = []

    @one_line_errors("script.py")
    def main(argv):
        """A script."""
        seen.append(argv)

    monkeypatch.setattr(sys, "argv", ["script.py", "--a", "b"])
    assert (main(), main([])) == (0, 0) and seen == [["--a", "b"], []]
    assert (main.__name__, main.__doc__) == ("main", "A script.")


def test_of_several_processes_one_speaks_and_all_end_with_the_code(monkeypatch, capsys):
    for rank, err in (("0", "script.py: wrong\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run(InputError("wrong")) == 2
        assert capsys.readouterr().err == err
