"""`clinometer` and `python -m clinometer`: Ctrl-C while Python still imports ends as quietly as later."""

import sys


def main() -> None:
    try:
        from clinometer.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
