"""Runs killed by SIGKILL in any place and started again leave the very bytes of an undisturbed one.

    python -m pytest -m slow -s tests/test_killed.py  # 20 kills, ten minutes on two cores, a table
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script, save_runs

TRAINING = ("train.py", "--init", "audio", "--data", "data/vision-audio", "--out", "run",
            "--save-every", 2, "--global-batch", 4, "--device", "cpu")
PLACES = {  # what is killed: command, processes of torchrun, the folder it writes, what shows it
    "data preparation": (("data.py", "shapes", "--out", "made", "--scenes", 80, "--clips", 200,
                          "--n", 100, "--test", 40), 0, "made",
                         "made/vision-text/images/000001.png"),
    "a step": (TRAINING, 0, "run", "run/log.jsonl"),
    "a step of two processes": (TRAINING, 2, "run", "run/log.jsonl"),
    "saving a checkpoint": (TRAINING, 0, "run", "run/.checkpoint.safetensors.*.tmp"),
    "saving the run": (TRAINING, 0, "run", "run/.saving.tmp"),
}
KILLS = [("data preparation", 4), ("a step", 4), ("a step of two processes", 4),
         ("saving a checkpoint", 3), ("saving the run", 1)]


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    """What every command finds: prepared data, a base, a run that listens, a benchmark."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(world, folder / "data")
    save_runs(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A function: (files, seconds from first writing to end) of a place's command left alone."""
    known = {}

    def of(place):
        command, processes, written, sign = PLACES[place]
        if (command, processes) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            shutil.copytree(start, folder, dirs_exist_ok=True)
            process = begin(command, processes, folder)
            wait_for(folder, PLACES["a step"][3] if command == TRAINING else sign, process)
            began = time.time()
            assert process.wait() == 0
            known[command, processes] = files(folder / written), time.time() - began
        return known[command, processes]

    return of


def begin(command, processes, folder):
    """Starts a command as a user would."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                     str(processes)]
    return subprocess.Popen(launcher + [str(ROOT / command[0]), *map(str, command[1:])], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(folder, pattern, process):
    """Returns as soon as a file is there; without sleeping, as some are there for a millisecond."""
    parent, name = (folder / pattern).parent, (folder / pattern).name
    while process.poll() is None and not any(parent.glob(name)):
        pass


def files(folder):
    """{name: SHA-256} of all files but locks, and of the log without what stands under "time"."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            content = path.read_bytes()
            if path.name == "log.jsonl":
                lines = [json.loads(line) for line in content.splitlines()]
                content = repr([{k: v for k, v in line.items() if k != "time"}
                                for line in lines]).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def kill_once(place, number, expected, seconds, start, folder, rng):
    """Kills the command at a random moment, or amid a save; whether that hit it where it should."""
    command, processes, written, sign = PLACES[place]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    process = begin(command, processes, folder)
    for saves_left in reversed(range(1 + 4 * number if place == "saving a checkpoint" else 1)):
        wait_for(folder, sign, process)
        while saves_left and any(folder.glob(sign)) and process.poll() is None:
            pass
    if not place.startswith("saving"):
        time.sleep(rng.uniform(0, seconds))
    process.kill()  # torchrun alone: its workers have to notice
    hit = (any(folder.glob(sign)) if place.startswith("saving")
           else files(folder / written) != expected)
    return process.wait() == -signal.SIGKILL and hit


@pytest.mark.slow
@pytest.mark.parametrize("place, number",
                         [(place, i) for place, count in KILLS for i in range(count)])
def test_killed_and_started_again_is_undisturbed(place, number, start, undisturbed, tmp_path):
    (expected, seconds), rng = undisturbed(place), random.Random(f"{place}/{number}")
    command, processes, written, _ = PLACES[place]
    folder = tmp_path / "killed"
    tries = next(i for i in range(1, 40)
                 if kill_once(place, number, expected, seconds, start, folder, rng))
    left = f"{len(files(folder / written))} of {len(expected)} files"
    left += "".join(f", {path.name[:9]}: {len(path.read_text().splitlines())} lines"
                    for path in (folder / written).glob("*.jsonl"))
    again = run_script(*command, cwd=folder, processes=processes)
    assert again.returncode == 0, again.stderr
    found = files(folder / written)
    print(f"\n| {place} | {number} | {left} | try {tries} "
          f"| {'equal' if found == expected else 'DIFFERENT'} |")
    assert found == expected
