"""On CI (CI=true) nothing is skipped without leave: a skip whose reason is not listed here fails the run, so that a
package, a browser or a file that is missing there is seen."""

import os

from runtime import cli

# A process of pytest runs many commands: what they free has to go back, or every fork copies it
cli.keep_freed_memory = lambda: None

ALLOWED = (
    "transformers",  # examples: tokenising with the library's own text encoder, which has to be downloaded
    "no cuobjdump",  # a build of Triton without NVIDIA's tools
    "CUDA",  # what only a GPU can run
)
UNEXPECTED = []


def noticed(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        _, _, reason = report.longrepr
        if not any(allowed in reason for allowed in ALLOWED):
            UNEXPECTED.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report):
    noticed(report)


def pytest_collectreport(report):
    noticed(report)


def pytest_sessionfinish(session):
    if UNEXPECTED and os.environ.get("CI") == "true":
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for line in UNEXPECTED:
        terminalreporter.write_line(f"skipped without leave (fails on CI): {line}")
