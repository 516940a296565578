"""The entry point of the ``horse`` command.

Each command imports what it needs when it runs. Torch takes seconds to load, and help, versions and
completions need none of it.
"""

import os
import sys
import traceback
import warnings

from horse_plugin.cli.app import app, say
from horse_plugin.errors import HorseError, UsageError, first_line, reason

# In the order of the help.
# isort: off
from horse_plugin.cli import preparing, changing, using, measuring  # noqa: F401
# isort: on


def run():
    """Entry point: exit code 0 done, 1 failed, 2 bad usage; one line on an error."""
    # Before torch loads. Threads that spin while they wait crawl beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug, errors = "--debug" in sys.argv[1:], sys.stderr
    if debug:  # anywhere on the line, not only before the command
        sys.argv = [a for a in sys.argv if a != "--debug"]
    else:
        warnings.showwarning = lambda message, *args, **kwargs: say(f"warning: {message}")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():  # of a launcher
            _join()
        app()
    except Exception as error:  # ours, or a bug of ours or of a library below: one line
        if debug:
            traceback.print_exc()
        say(f"horse: {_one_line(error)}", errors)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _join():
    """Join the other processes; all but the main one print nothing but their errors."""
    from horse_plugin import distributed

    distributed.initialize()
    if not distributed.is_main_process():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _one_line(error: Exception) -> str:
    if isinstance(error, HorseError):
        return first_line(error)
    return f"{reason(error)} (--debug shows where)"
