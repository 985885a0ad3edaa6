"""A step that can fail: it names itself, the reason, and what to do."""

from __future__ import annotations

import subprocess


class StepError(Exception):
    """Names the failed step, why it failed and what the user can do."""

    def __init__(self, step: str, reason: str, remedy: str):
        super().__init__(f"{step} failed: {reason.rstrip('.')}. {remedy}")


def say(text: str) -> None:
    print(f"ridfr: {text}", flush=True)


def run(step: str, command: list, remedy: str, **options) -> None:
    """Run `command` with its output on the terminal; StepError when it does not end with 0."""
    program = command[2] if command[1] == "-m" else command[0]
    try:
        # Inheritable handles alone pass to the child: the cache's lock, which must outlive us as long as it writes.
        code = subprocess.run([str(part) for part in command], close_fds=False, **options).returncode
    except OSError as error:
        raise StepError(step, f"{program} does not start ({error.strerror})", remedy) from error
    if code != 0:
        raise StepError(step, f"{program} ended with code {code}; what it said is above", remedy)
