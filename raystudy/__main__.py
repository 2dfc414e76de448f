"""The `raystudy` command: Ctrl-C while the verbs are still being loaded ends as it does in a verb."""

import sys


def main() -> None:
    """Entry point of the `raystudy` command and of `python -m raystudy`."""
    try:
        from raystudy.cli import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
