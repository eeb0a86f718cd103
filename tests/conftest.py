"""Run many tests in two processes, half of them in each: so they end in about half the time
on two cores. What the second one prints comes at the end."""

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before a test imports torch
MANY = 300
second = None                                           # the process, in the first one
printed = tempfile.TemporaryFile("w+")


def pytest_collection_modifyitems(config, items):
    global second
    if len(items) < MANY or config.option.collectonly:
        return
    part = int(os.environ.get("TESTS_PART", 0))
    if part == 0:
        second = subprocess.Popen(
            [sys.executable, "-m", "pytest", *config.invocation_params.args],
            cwd=config.invocation_params.dir, env={**os.environ, "TESTS_PART": "1"},
            stdout=printed, stderr=subprocess.STDOUT)
    items[:] = items[part::2]


def pytest_sessionfinish(session, exitstatus):
    if second is not None:
        session.exitstatus = second.wait() or exitstatus


def pytest_terminal_summary(terminalreporter):
    if second is not None:
        second.wait()
        printed.seek(0)
        terminalreporter.write(f"\n---- the other half ----\n{printed.read()}")
    printed.close()
