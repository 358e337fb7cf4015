"""On CI (CI=true) a skip whose reason is not listed here fails the run: a package, a browser or a
file is missing."""

import os

ALLOWED = (
    "transformers",  # examples: tokenising by a text encoder that has to be downloaded
    "no cuobjdump",  # a build of Triton without NVIDIA's tools
    "CUDA",  # what only a GPU can run
)
UNEXPECTED = []


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        _, _, reason = report.longrepr
        if not any(allowed in reason for allowed in ALLOWED):
            UNEXPECTED.append(f"{report.nodeid}: {reason}")


pytest_collectreport = pytest_runtest_logreport


def pytest_sessionfinish(session):
    if UNEXPECTED and os.environ.get("CI") == "true":
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for line in UNEXPECTED:
        terminalreporter.write_line(f"unexpected skip (fails on CI): {line}")
