"""``python -m streamdiff``: the command line."""

import signal

# While modules are imported there is nothing to close: Ctrl-C ends the process, and no traceback is left.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from streamdiff.cli.main import entry  # noqa: E402

if __name__ == "__main__":
    entry()
