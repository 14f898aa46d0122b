"""What a user sees of an error: one line, and the exit code."""

import pytest
import torch

import evaluate
import train
from vit import ViT, checkpoint
from vit.errors import InputError, Stopped, one_line_errors


def run(error):
    """Run a decorated script that raises an error, and return its exit code."""

    @one_line_errors("script.py")
    def main(argv):
        if error is not None:
            raise error

    return main([])


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def fail(*_):
    raise NO_MEMORY


def test_every_error_of_a_user_is_one_line_and_an_exit_code(capsys, monkeypatch):
    assert run(None) == 0 and capsys.readouterr() == ("", "")
    for error, code, line in (
        (InputError("a: wrong\n\tvalue"), 2, "a: wrong value"),
        (Stopped("stopped by SIGTERM; go on", code=143), 143, "stopped by SIGTERM; go on"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (FileNotFoundError(2, "No such file", "a.yaml"), 2, "a.yaml: No such file"),
    ):
        assert run(error) == code
        assert capsys.readouterr() == ("", f"script.py: {line}\n")
    assert run(NO_MEMORY) == 1 and capsys.readouterr().err == "script.py: out of memory\n"
    monkeypatch.setattr(train, "parse_flags", fail)
    assert train.main([]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "train.accumulation_steps" in err  # what helps
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    assert run(InputError("wrong")) == 2 and capsys.readouterr().err == "script.py: wrong\n"
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # these were started by torchrun
    assert run(InputError("wrong")) == 2 and capsys.readouterr().err == ""


def test_an_error_of_the_program_keeps_its_traceback_and_help_its_exit():
    for error in (ValueError("a bug"), RuntimeError("a bug"), OSError(5, "a bug"), SystemExit(0)):
        with pytest.raises(type(error)) as caught:
            run(error)
        assert caught.value is error


@pytest.mark.parametrize("bug", [KeyError, AttributeError, TypeError, IndexError])
def test_a_bug_in_the_model_or_in_taking_up_a_state_is_never_shown_as_a_users_mistake(
    bug, run_train, tmp_path, monkeypatch, capsys
):
    def planted(*_, **__):
        raise bug("planted")

    assert run_train()[0] == 0
    path = str(tmp_path / "run" / checkpoint.NAME)
    resume, use = ["--resume", str(tmp_path / "run")], ["--checkpoint", path]
    fresh = ["--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(tmp_path / "new")]
    start = ["--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(tmp_path / "other")]
    for owner, name, calls in (
        (ViT, "forward", [(train.main, fresh), (evaluate.main, use)]),
        (torch.nn.Module, "load_state_dict", [(train.main, resume), (evaluate.main, use)]),
        (torch.nn.Module, "load_state_dict", [(train.main, [*start, "--train.init_from", path])]),
        (checkpoint.TrainState, "load_state_dict", [(train.main, resume)]),
        (torch.optim.Optimizer, "load_state_dict", [(train.main, resume)]),
    ):
        for main, argv in calls:
            with monkeypatch.context() as patch, pytest.raises(bug, match="planted"):
                patch.setattr(owner, name, planted)
                main(argv)
    assert "Traceback" not in capsys.readouterr().err  # Python itself prints it, from the shell
