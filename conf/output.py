"""Stdout and stderr as views of a command: what cannot be shown ends nothing."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def open_output() -> None:
    """Makes stdout and stderr take any character, as an escape where the terminal lacks it, and
    anything at all where the shell has closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # what it holds back is written first
                stream.reconfigure(errors="backslashreplace")


def print_error(line: str) -> None:
    """Prints a line on stderr, if it can be written there."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    end_quietly(sys.stderr)


class Harmless:
    """A text stream that loses what it cannot write, and raises nothing.

    Its reader may have gone away, the disk under it may be full, and its encoding may lack a
    character, which is written as an escape."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        encoding = self._stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hands on what can be handed on."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextmanager
def harmless_output() -> Iterator[None]:
    """Makes stdout and stderr views that cannot end what is at work."""
    before = sys.stdout, sys.stderr
    # Both are None where the shell has closed them.
    streams = [stream or open(os.devnull, "w") for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = (Harmless(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            end_quietly(stream)


class Named:
    """A text stream whose errors say its name, as those of a file do."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text."""
        with self._naming():
            return self._stream.write(text)

    def flush(self) -> None:
        """Hands on what is held back."""
        with self._naming():
            self._stream.flush()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is not None:  # else its text would be lost
                error.filename = self._name
            raise


@contextmanager
def named_stdout() -> Iterator[None]:
    """Makes what stdout refuses an error that says so: the errors of a stream have no name."""
    before = sys.stdout
    sys.stdout = Named(before, "stdout")
    try:
        yield
    finally:
        sys.stdout = before


def end_quietly(stream: TextIO) -> None:
    """Throws away what a stream could not write: Python would try again at its exit, and make a
    failure of it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
