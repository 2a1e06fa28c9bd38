"""What the exit code of a run tells whoever started it. Beyond 128 a signal ended it."""

EXIT_USER_ERROR = 2  # the line on stderr says what to change
EXIT_TAKEN_OVER = 2  # another process holds the run folder now, as for a newcomer that is refused
EXIT_DIVERGED = 3  # too many steps in a row were not finite
EXIT_LOST = 4  # another process died, failed or hung; start the same command again
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved but not done; start the same command again
# All processes of a run end by one of these, the main one perhaps much later.
IN_ORDER = (0, EXIT_DIVERGED, EXIT_PREEMPTED)
