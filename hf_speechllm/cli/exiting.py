"""End of a process without the teardown of the interpreter.

Threads of gloo that DDP started outlive `destroy_process_group` (torch 2.14). If one runs while the interpreter is
torn down, the process aborts after everything is saved, and the launcher reports a failed run.
"""

import atexit
import logging
import os
import sys

_status: int | None = None


def skip_teardown(status: int) -> None:
    """Ends the process with this exit status after all exit handlers that are registered after this module's import.

    Args:
        status: exit status of the process.
    """
    global _status
    _status = status


# Handlers run in reverse order: those of torch and of trackers, which are imported later, run before this handler.
@atexit.register
def _exit() -> None:
    if _status is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
