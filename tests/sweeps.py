"""Sweeps and their status from within a test: only the runs are processes of their own."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

import train
from launch import config, status


def sweep(*arguments: str) -> tuple[int, str]:
    """Exit code and output of python train.py -m ARGUMENTS."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", ["train.py", "-m", *arguments])
        try:
            config.main(train.main)
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code, printed.getvalue()
    return 0, printed.getvalue()


def fare(folder: Path, *arguments: str) -> str:
    """Output of python -m launch.status FOLDER ARGUMENTS."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status.main([str(folder), *arguments])
    return printed.getvalue()
