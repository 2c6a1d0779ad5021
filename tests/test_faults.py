"""Nothing lost: locks, signals, dead processes, full disks, and another number of processes."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here, run_script
from safetensors.torch import load_file, save_file
from test_train import FLOAT64, losses, same_steps

from plumbing import checkpoint
from plumbing.files import BadInput, atomic_write, folder_lock, readable_errors
from world.muon import Muon


def begin(*arguments, cwd, torchrun=()):
    """Starts train.py (in double precision) on as many processes as torchrun is told."""
    launcher = [sys.executable,
                *(["-m", "torch.distributed.run", *map(str, torchrun)] if torchrun else [])]
    return subprocess.Popen([*launcher, str(ROOT / FLOAT64), *map(str, arguments)], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process, seconds=60):
    """Returns when a file is there. Fails if the process ends before."""
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)


def our_processes(out):
    """{id: id of the parent} of all processes that train into this folder."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if str(out) in (place / "cmdline").read_text():
                found[int(place.name)] = int(
                    (place / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def options(start, world, tmp_path_factory):
    """20 steps of AdamW in float64 of five samples, the last of one: one of two processes is idle.

    Every fifth answer is far longer than the others, and so one process's share of the tokens.
    """
    folder = tmp_path_factory.mktemp("ragged") / "vision-audio"
    folder.mkdir()
    rows = list(map(json.loads,
                    (world / "vision-audio/samples.jsonl").read_text().splitlines()))[:96]
    rows = [{**row, "answer": " ".join([row["answer"]] * (1 if i % 5 else 20))}
            for i, row in enumerate(rows)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("images", "audio"):
        (folder / name).symlink_to(world / "vision-audio" / name)
    return ["--init", start / "audio", "--data", folder, "--global-batch", 5, "--micro-batch", 3,
            "--device", "cpu"]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """The same in one process, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_here(FLOAT64, *options, "--out", folder / "run", cwd=folder)
    assert done.returncode == 0 and len(losses(folder / "run")) == 20, done.stderr
    return folder / "run"


def test_two_processes_compute_the_same_steps_as_one(options, undisturbed, tmp_path):
    done = run_script(FLOAT64, *options, "--out", tmp_path / "run", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    same_steps(tmp_path / "run", undisturbed)
    states = [load_file(folder / "model.safetensors") for folder in (tmp_path / "run", undisturbed)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_answering_by_itself_is_the_same_on_two_processes(options, tmp_path):
    options = [*options, "--on-policy", 0.5]
    one = run_here(FLOAT64, *options, "--out", tmp_path / "one", cwd=tmp_path)
    two = run_script(FLOAT64, *options, "--out", tmp_path / "two", cwd=tmp_path, processes=2)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    same_steps(tmp_path / "one", tmp_path / "two")
    alone = [line["step"] for line in losses(tmp_path / "one") if line["ce"] == 0]
    assert 4 < len(alone) < 16, "about half of the steps have no label"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(),
                    reason="looks for processes as Linux lists them")
def test_torchrun_is_killed_and_one_process_goes_on(options, undisturbed, tmp_path):
    """Two processes, SIGKILL to torchrun alone; workers notice; the rest on one: the same steps."""
    out = tmp_path / "run"
    process = begin(*options, "--save-every", 4, "--out", out, cwd=tmp_path,
                    torchrun=("--standalone", "--nproc_per_node", 2))
    wait_for(out / "checkpoint.safetensors", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 20
    while our_processes(out) and time.time() < deadline:
        time.sleep(0.1)
    assert not our_processes(out) and not (out / "ollm.json").exists()
    other = run_here(FLOAT64, *options, "--alpha", 0, "--out", out, cwd=tmp_path)
    assert (other.returncode == 1
            and "another training (alpha is 0.75 there and 0.0 here)" in other.stderr)
    again = run_here(FLOAT64, *options, "--out", out, cwd=tmp_path)
    assert again.returncode == 0 and "going on after step" in again.stdout, again.stderr
    same_steps(out, undisturbed)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    other = run_here(FLOAT64, *options, "--lr", 1e-4, "--out", out, cwd=tmp_path)
    assert (other.returncode == 1
            and "finished run of another training (lr is 0.001 there" in other.stderr)


@pytest.mark.parametrize("spoil, named", [
    ("data", "data is "),
    pytest.param("start", "init is ", marks=pytest.mark.slow),
    pytest.param("option", "lr is 0.001 there and 0.002 here", marks=pytest.mark.slow)])
def test_processes_that_see_other_things_do_not_train(start, world, tmp_path, spoil, named):
    """Two machines, each with a copy of its own, one of which differs: it trained."""
    for rank in (0, 1):
        shutil.copytree(world / "vision-audio", tmp_path / f"{rank}/part")
        shutil.copytree(start, tmp_path / f"{rank}/runs")
    lines = (tmp_path / "1/part/samples.jsonl").read_text().splitlines(keepends=True)
    if spoil == "data":
        (tmp_path / "1/part/samples.jsonl").write_text("".join(lines[:-1]))
    if spoil == "start":
        weights = load_file(tmp_path / "1/runs/audio/model.safetensors")
        weights["projector.weight"] += 1
        save_file(weights, tmp_path / "1/runs/audio/model.safetensors")
    (tmp_path / "node.py").write_text(
        "import os, runpy, sys\nrank = os.environ['RANK']\nos.chdir(rank)\n"
        f"sys.argv += ['--lr', '0.002'] if rank == '1' and {spoil == 'option'} else []\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    done = run_script(tmp_path / "node.py", "--init", "runs/audio", "--data", "part", "--out",
                      tmp_path / "out", "--device", "cpu", cwd=tmp_path, processes=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and not (tmp_path / "out/ollm.json").exists(), done.stdout
    assert errors and all("not all processes see the same" in error for error in errors), errors
    assert any(named in error for error in errors), errors


@pytest.mark.parametrize("number", [signal.SIGINT,
                                    pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_after_the_step_and_saves_it(number, options, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = begin(*options, "--out", out, cwd=tmp_path)
    wait_for(out / "log.jsonl", process)
    while not (out / "log.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    last = errors.splitlines()[-1]
    assert (process.returncode == 130
            and last.startswith("interrupted: vision-audio stands at")), errors
    assert "Traceback" not in errors and f"saved in {out}" in last and "same command" in last
    assert f"stands at {len(losses(out))} of 20 steps" in last
    again = run_here(FLOAT64, *options, "--out", out, cwd=tmp_path)
    assert again.returncode == 0 and f"going on after step {last.split()[4]}\n" in again.stdout
    assert ((out / "model.safetensors").read_bytes()
            == (undisturbed / "model.safetensors").read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(),
                    reason="looks for processes as Linux lists them")
def test_a_dead_rank_ends_the_job(options, tmp_path):
    """A readable error within a minute, and the checkpoint is kept."""
    out = tmp_path / "run"
    process = begin(*options, "--save-every", 4, "--out", out, cwd=tmp_path,
                    torchrun=("--standalone", "--nproc_per_node", 2))
    wait_for(out / "checkpoint.safetensors", process)
    workers = [pid for pid, parent in our_processes(out).items() if parent == process.pid]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    began = time.time()
    _, errors = process.communicate(timeout=100)
    ours = [line for line in errors.splitlines() if line.startswith(("error:", "interrupted"))]
    assert process.returncode != 0 and time.time() - began < 60 and len(ours) <= 1, errors
    assert not (out / "ollm.json").exists() and (out / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_two_nodes_on_one_machine(options, undisturbed, tmp_path):
    torchrun = ("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint",
                f"127.0.0.1:{free_port()}")
    nodes = [begin(*options, "--out", tmp_path / "run", cwd=tmp_path, torchrun=torchrun)
             for _ in range(2)]
    for node in nodes:
        printed, errors = node.communicate(timeout=150)
        assert node.returncode == 0, errors
    same_steps(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(options, tmp_path):
    out = tmp_path / "run"
    process = begin(*options, "--save-every", 4, "--out", out, cwd=tmp_path)
    wait_for(out / "checkpoint.safetensors", process)
    process.kill()
    process.communicate()
    before = (out / "checkpoint.safetensors").read_bytes()
    full = run_script(FLOAT64, *options, "--save-every", 1, "--out", out, cwd=tmp_path,
                      largest_file=300_000)
    assert full.returncode == 1 and "checkpoint.safetensors: could not be saved" in full.stderr
    assert "Traceback" not in full.stderr
    assert (out / "checkpoint.safetensors").read_bytes() == before and not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, Muon])
def test_what_has_had_no_gradient_yet_goes_on_as_exactly(optimizer_class, tmp_path):
    """Text alone leaves the vision encoder no gradient: AdamW has fewer steps of it, or none."""
    def start():
        torch.manual_seed(0)
        layers = {name: torch.nn.Parameter(torch.randn(3, 2))
                  for name in ("often", "seldom", "never")}
        return layers, optimizer_class(layers.values(), lr=0.1, fused=True)

    def step(layers, optimizer, i):
        optimizer.zero_grad()
        (layers["often"].square().sum()
         + (layers["seldom"].square().sum() if i % 3 == 1 else 0)).backward()
        optimizer.step()

    path = tmp_path / "checkpoint.safetensors"
    straight, resumed = start(), start()
    for i in range(7):
        step(*straight, i)
        step(*resumed, i)
        checkpoint.save(path, i + 1, {"stage": "x"}, *resumed)
        resumed = start()
        assert checkpoint.load(path, {"stage": "x"}, 7, *resumed, torch.device("cpu")) == i + 1
    with pytest.raises(BadInput, match="taken 7 steps, more than 6"):
        checkpoint.load(path, {"stage": "x"}, 6, *resumed, torch.device("cpu"))
    assert all(torch.equal(straight[0][name], resumed[0][name]) for name in straight[0])


def test_one_writer_a_folder_and_its_lock_dies_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c",
                               "import sys, time\nfrom plumbing.files import folder_lock\n"
                               "with folder_lock(sys.argv[1]):\n"
                               " print('held', flush=True)\n time.sleep(60)",
                               str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    (tmp_path / "run/.model.safetensors.7.tmp").write_text("half")
    with pytest.raises(BadInput, match="run: "), folder_lock(tmp_path / "run", 0.3):
        pass
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path / "run", 0):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"], (
            "what was half done is removed")


def test_one_writer_a_file_leaves_the_folder_s_other_files_to_others(tmp_path):
    half = {name: tmp_path / f".{name}.7.tmp" for name in ("MME[1].jsonl", "DocVQA.jsonl")}
    with folder_lock(tmp_path, 0, file="MME[1].jsonl"):
        for path in half.values():
            path.write_text("half")
        with folder_lock(tmp_path, 0, file="DocVQA.jsonl"):
            assert [path.exists() for path in half.values()] == [True, False], "its own half goes"
        with pytest.raises(BadInput, match=r"MME\[1\].jsonl: "):
            with folder_lock(tmp_path, 0, file="MME[1].jsonl"):
                pass
    with folder_lock(tmp_path, 0, file="MME[1].jsonl"):
        assert not half["MME[1].jsonl"].exists()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(path, sync=True) as temporary:
        temporary.write_text("half")
        1 / 0
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path, sync=True) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_worker_that_is_killed_is_an_error_and_no_hang(tmp_path):
    program = ("import os\nfrom plumbing.files import readable_errors\n"
               "from plumbing.processes import workers\n"
               "with readable_errors(), workers() as pool:\n list(pool.map(os._exit, [1, 1]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode == 1 and done.stderr.startswith("error: ")
            and "was killed" in done.stderr)
    assert done.stderr.count("\n") == 1


class Spoilt(torch.utils.data.Dataset):
    """Data whose reading fails as told."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.fail()


def refuse():
    raise BadInput("samples.jsonl:3: the image is broken")


@pytest.mark.parametrize("fail, message", [
    (refuse, "error: samples.jsonl:3: the image is broken"),
    (functools.partial(os._exit, 1), "error: DataLoader worker")])
def test_what_goes_wrong_where_data_is_read_ahead_is_one_line(fail, message):
    loader = torch.utils.data.DataLoader(Spoilt(fail), batch_size=None, num_workers=1)
    with pytest.raises(SystemExit) as exit, readable_errors():
        list(loader)
    assert str(exit.value).startswith(message) and "\n" not in str(exit.value)
