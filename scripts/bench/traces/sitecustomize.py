"""On PYTHONPATH: every Python process writes the stacks of all its threads to standard error on SIGUSR1."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR1, all_threads=True)
