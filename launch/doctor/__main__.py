"""Looks whether this machine can run flatgpt: python -m launch.doctor [KEY=VALUE ...]."""

import sys

from launch.doctor.finding import is_bad, show
from launch.doctor.software import software


def main(arguments: list[str]) -> int:
    """Prints what is found on this machine, a line a subject; returns the exit code, 1 where
    something failed."""
    found = list(software())
    if is_bad(found):
        # The rest imports packages that are not here, or not as they must be.
        show(found)
        return 1
    from conf.cli import user_errors
    from launch.doctor.examine import examine

    with user_errors():
        return int(is_bad(examine(arguments, found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
