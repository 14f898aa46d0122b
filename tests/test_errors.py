"""What a user sees of an error: one line, and the exit code."""

import pytest
import torch

from vit.errors import InputError, Stopped, one_line_errors


def run(error):
    """Run a decorated script that raises an error, and return its exit code."""

    @one_line_errors("script.py")
    def main(argv):
        if error is not None:
            raise error

    return main([])


def test_every_error_of_a_user_is_one_line_and_an_exit_code(capsys, monkeypatch):
    assert run(None) == 0 and capsys.readouterr() == ("", "")
    for error, code, line in (
        (InputError("a: wrong\n\tvalue"), 2, "a: wrong value"),
        (Stopped("stopped by SIGTERM; go on", code=143), 143, "stopped by SIGTERM; go on"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ):
        assert run(error) == code
        assert capsys.readouterr() == ("", f"script.py: {line}\n")
    assert run(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "train.accumulation_steps" in err  # what helps
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    assert run(InputError("wrong")) == 2 and capsys.readouterr().err == ""


def test_an_error_of_the_program_keeps_its_traceback_and_help_its_exit():
    for error in (ValueError("a bug"), RuntimeError("a bug"), SystemExit(0)):
        with pytest.raises(type(error)) as caught:
            run(error)
        assert caught.value is error
