"""What tests count, such as kills, is printed at the end, also of tests that ran in a process beside."""

import pytest

COUNT = "count"  # among what a test's report carries


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for state in ("passed", "failed") for r in terminalreporter.getreports(state) if r.when == "call"]
    counts = [line for report in reports for name, line in report.user_properties if name == COUNT]
    if counts:
        terminalreporter.section("faults and what came of them")
    for line in counts:
        terminalreporter.write_line(line)
