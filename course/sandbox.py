"""Runs graders apart from the command that counts, which they tell what passed, with a signature.

A process with a clean environment imports the libraries once, and forks for each grader. So a part
takes a second or two, and the tested code finds neither the lecturer's folders nor his terminal.
`python -m course grade` starts this file; nobody else does.
"""

import contextlib
import hmac
import importlib
import json
import os
import pwd
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 60  # that a grader may take
LIBRARIES = ("pytest", "matplotlib", "soundfile", "torch.distributed.tensor", "torch._dynamo",
             "transformers.models.internvl.modeling_internvl", "transformers.loss.loss_utils",
             "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2_vl",
             "transformers.models.whisper.modeling_whisper", "espeakng_loader")


# ---- the process that counts ---------------------------------------------------------------------


@contextlib.contextmanager
def sandbox(user=None):
    """Yields run(tree, part, seconds), which returns (what a grader told, how its process ended).

    What it told is a list of dicts: {"collected": [tests]}, {"test", "outcome", "wrong"} and
    {"wrong"}. user: the name of the user who runs it; None: who runs this
    """
    environment = {"PATH": os.defpath, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    with subprocess.Popen([sys.executable, __file__], env=environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:

        def run(tree, part, seconds=SECONDS):
            key, report = secrets.token_hex(32), Path(f"{tree}.report")
            job = {"tree": str(tree), "part": part, "user": user, "key": key, "report": str(report)}
            print(json.dumps([seconds, job]), file=server.stdin, flush=True)
            end = server.stdout.readline().strip() or "the sandbox has died"
            told = report.read_text(errors="replace").splitlines() if report.exists() else []
            lines = [line.partition(" ") for line in told]
            return [json.loads(text) for mark, _, text in lines if mark == sign(key, text)], end

        try:
            yield run
        finally:
            server.kill()


def sign(key, text):
    """Returns the signature of a line. It does not tell the key."""
    return hmac.new(key.encode(), text.encode(), "sha256").hexdigest()


# ---- the process that forks ----------------------------------------------------------------------


def serve():
    """Runs a grader in a forked process for each line of stdin; answers with how it ended."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        seconds, job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_grader(**job)
        print(wait(pid, seconds), flush=True)


def wait(pid, seconds):
    """Waits for a process and ends what it leaves behind. Returns how it ended, in words."""
    deadline, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < deadline:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return f"took over {seconds} s"
    code = os.waitstatus_to_exitcode(status)
    megabytes = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if code == -signal.SIGKILL:
        return f"was killed, perhaps for want of memory: it had {megabytes:.0f} MB"
    return f"the process ended with {code} ({megabytes:.0f} MB)"


def run_grader(tree, part, user, key, report):
    """Runs a part's grader in this process, as another user if one is named, and ends it."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        written = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, target in enumerate((nothing, written, nothing)):
            os.dup2(target, number)
        if user:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        os.environ["HOME"] = sys.path[0] = tree
        os.chdir(tree)

        import pytest

        pytest.main(["-x", "-q", "-s", "--tb=short", "--noconftest", "-p", "no:cacheprovider",
                     f"tests/course/test_{part}.py"], plugins=[reporter(key)])
    finally:
        os._exit(0)


def reporter(key):
    """Returns a pytest plugin that writes what happens to stdout, signed."""

    def tell(**facts):
        text = json.dumps(facts)
        os.write(1, f"\n{sign(key, text)} {text}\n".encode())

    def wrong(report):
        if isinstance(report.longrepr, tuple):  # file, line, reason
            return report.longrepr[2]
        text = report.longreprtext
        error = re.search(r"(?m)^E   (?:AssertionError: |Failed: )?(\S.*)$", text)
        line = error[1] if error else text.strip().rpartition("\n")[2]
        return line[:600].encode("ascii", "backslashreplace").decode()  # any terminal shows it

    class Reporter:
        def pytest_collectreport(self, report):
            if not report.passed:
                tell(wrong=wrong(report))

        def pytest_collection_finish(self, session):
            tell(collected=[item.name for item in session.items])

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or not report.passed:
                outcome = "expected to fail" if hasattr(report, "wasxfail") else report.outcome
                tell(test=report.nodeid.partition("::")[2], outcome=outcome, wrong=wrong(report))

    return Reporter()


if __name__ == "__main__":
    serve()
