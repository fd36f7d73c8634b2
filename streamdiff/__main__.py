"""``python -m streamdiff``: the command line."""

from streamdiff.cli.main import entry

if __name__ == "__main__":
    entry()
