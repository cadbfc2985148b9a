"""What a model's code prints or would read while a command runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fxsplit_cli.streams import result_alone


def test_what_is_printed_goes_to_stderr_by_whatever_means(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with result_alone():
        print("printed")
        os.write(1, b"written\n")
        subprocess.run(["echo", "by a program"], check=True)
    print("after", flush=True)
    os.write(1, b"and after\n")
    out, err = capfd.readouterr()
    assert out == "before\nafter\nand after\n"
    assert sorted(err.splitlines()) == ["by a program", "printed", "written"]


@pytest.mark.parametrize("command", ["inspect paper:cnn", "check paper:cnn --meta"])
def test_who_reads_no_more_ends_the_command_without_a_word(command: str) -> None:
    words = [sys.executable, "-m", "fxsplit", *command.split()]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    said = done.stderr
    assert done.returncode == 1
    assert "the model's code" not in said
    assert "Traceback" not in said


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    kept = os.dup(0)
    os.dup2(read, 0)
    try:
        os.write(write, b"yes\n")
        monkeypatch.setattr(sys, "stdin", before := object())
        with result_alone():
            assert os.read(0, 10) == b""
            with pytest.raises(EOFError):
                input()
        assert sys.stdin is before
        assert os.read(0, 10) == b"yes\n"
    finally:
        os.dup2(kept, 0)
        for each in (read, write, kept):
            os.close(each)


def test_streams_that_are_closed_stay_so() -> None:
    code = (
        "import os\nfrom fxsplit_cli.streams import result_alone\n"
        "os.close(0)\n"
        "with result_alone():\n    os.write(1, b'inside')\n"
        "try:\n    os.fstat(0)\nexcept OSError:\n    print('closed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("closed\n", "inside")
