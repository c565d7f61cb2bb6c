from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have recorded under the name `summary`, whichever process they ran in."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    lines = [value for report in calls for name, value in report.user_properties if name == "summary"]
    for line in lines:
        terminalreporter.write_line(line)
