"""From the command line to a checked `Config`."""

from conf.cli import parse, user_errors
from launch.config.configure import check, compose, main

__all__ = ["check", "compose", "main", "parse", "user_errors"]
