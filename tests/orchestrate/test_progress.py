"""What a person sees: bars and a line a running trial on a terminal, plain lines in a log, text as it is."""

import os
import pty
import subprocess
import sys

CODE = """
from raystudy.orchestrate.progress import display

with display() as shown:
    shown.say("a line [/x] that stays")
    shown.count("images [raw]", 3, 8, "1.5 [/x] images/s")
    shown.running({"one [/x]": "2/9 joint [/y]", "two": "1/9 warm"})
    shown.running({"one [/x]": "3/9 joint [/y]"})
"""


def on_a_terminal(code: str) -> str:
    """Run Python code on a terminal of its own and return what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    got = b""
    try:
        while part := os.read(ours, 4096):
            got += part
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(30) == 0, got.decode()
    return got.decode()


def test_bars_show_text_as_it_is_and_only_trials_that_run() -> None:
    shown = on_a_terminal(CODE)
    for words in (
        "a line [/x] that stays",
        "images [raw]",
        "3/8",
        "1.5 [/x] images/s",
        "one [/x]",
        "3/9",
        "joint [/y]",
    ):
        assert words in shown
    assert "two" not in shown.rsplit("images [raw]", 1)[1]


def test_a_log_gets_plain_lines_the_first_and_the_last_of_a_count_at_once() -> None:
    counting = CODE + "\n    for done in (3, 4, 5, 8):\n        shown.count('images [raw]', done, 8)\n"
    told = subprocess.run([sys.executable, "-c", counting], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.splitlines() == [
        "a line [/x] that stays",
        "images [raw]: 3/8  1.5 [/x] images/s",
        "images [raw]: 8/8",
    ]
    assert told.stderr == ""
