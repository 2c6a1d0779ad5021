"""Atomic writes, folder locks, readers of JSONL and TSV, and one-line error messages."""

import argparse
import contextlib
import csv
import glob
import gzip
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from filelock import FileLock, Timeout

# Messages of torch when another rank or a DataLoader worker has died.
OTHER_PROCESS = re.compile("gloo|NCCL|DataLoader worker|process pool")

# Messages of torch when a GPU or the machine is out of memory.
WANT_OF_MEMORY = re.compile("out of memory|can't allocate memory")


class BadInput(Exception):
    """Invalid input; the message names the file, the line and the fault."""


# ---- errors in one line --------------------------------------------------------------------------


@contextlib.contextmanager
def at(where):
    """Turns any error inside into a BadInput that begins with `where`: "samples.jsonl:7: ..."."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput) and str(error).startswith(str(where)):
            raise  # it says where already
        kind = "" if isinstance(error, (BadInput, OSError)) else f"{type(error).__name__}: "
        raise BadInput(f"{where}: {kind}{one_line(error)}") from error


@contextlib.contextmanager
def enough_memory(advice):
    """Turns an out-of-memory error, of a GPU or the machine, into a BadInput with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if not isinstance(error, MemoryError) and not WANT_OF_MEMORY.search(str(error)):
            raise
        raise BadInput(f"out of memory; {advice} ({one_line(error, 200)})") from error


@contextlib.contextmanager
def readable_errors():
    """Ends a script with one line on stderr and a non-zero exit code if the input is invalid.

    Ctrl-C and SIGTERM also end it with one line, and exit code 130. SELF_KD_TRACEBACK=1 shows
    the traceback instead.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
            where = f": {error}" if error.args else ""
            print(f"interrupted{where}; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (BadInput, OSError, RuntimeError) as error:  # torch raises RuntimeErrors
        dead = isinstance(error, BrokenProcessPool) or OTHER_PROCESS.search(str(error))
        unknown = isinstance(error, RuntimeError) and not dead
        if unknown or os.environ.get("SELF_KD_TRACEBACK"):
            raise
        hint = ""
        if isinstance(error, RuntimeError):
            hint = " (another process of this job failed and says why, or was killed)"
        sys.exit(f"error: {one_line(error)}{hint}")


def one_line(error, most=1000):
    """Returns an error's message without line breaks, at most so many characters of it."""
    # A DataLoader worker puts its traceback before the message.
    text = re.sub(r"(?s)^Caught BadInput in DataLoader.*BadInput: ", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


def in_range(low, most=math.inf):
    """Returns an argparse type: a finite number from `low` to `most`, of the type of low."""
    def number(text):
        value = type(low)(text)
        if low <= value <= most and value < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {most:g}")
    return number


# ---- reading -------------------------------------------------------------------------------------


def read_json(path):
    """Returns a JSON file's value. Raises BadInput with the file's name."""
    with at(path):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def json_lines(path):
    """Yields ("file:line", value) for each line of a JSONL file. Raises BadInput with the place."""
    with at(path), unpacker(path)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            with at(where):
                value = json.loads(line)
            yield where, value


def table_rows(path, needed=(), errors="strict", **options):
    """Yields ("file:line", {column: cell}) of each row of a TSV that is not blank.

    needed: columns that its first line must name; errors: of its UTF-8; options: csv.reader's
    Raises BadInput with the place, also for a row that has more or fewer cells than the first.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole picture
    text = {"encoding": "utf-8-sig", "errors": errors, "newline": ""}
    with at(path), unpacker(path)(path, "rt", **text) as file:
        lines = csv.reader(file, delimiter="\t", **options)
        with at(f"{path}:1"):
            header = next(lines, [])
            lacking = [name for name in needed if name not in header]
            if lacking or not header or len(set(header)) < len(header):
                raise BadInput(f"must name the columns {', '.join(needed)}, and none twice")

        while True:
            where = f"{path}:{lines.line_num + 1}"
            with at(where):
                cells = next(lines, None)
                if cells and len(cells) != len(header):
                    raise BadInput(f"has {len(cells)} cells, the first line has {len(header)}")
            if cells is None:
                return
            if cells:
                yield where, dict(zip(header, cells))


def unpacker(path):
    """Returns the function that opens a file: of a .gz it is gzip's."""
    return gzip.open if Path(path).suffix == ".gz" else open


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path, sync=False):
    """Yields a temporary path and renames it to `path` on success, so no file is ever partial.

    sync: fsync first, so that even a power cut leaves no partial file
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers that share a disk may have the same process ids.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if sync:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_lines(path, values):
    """Writes a JSONL file atomically, a value a line."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


@contextlib.contextmanager
def atomic_folder(folder, last):
    """Yields a temporary folder and moves its files into `folder` on success.

    last: the file that is moved last; if it exists, all others are complete
    """
    folder = Path(folder)
    temporary = folder / ".saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with at(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                flush_to_disk(path)
                os.replace(path, folder / path.name)
            flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_to_disk(path):
    """Calls fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_lock(folder, patience=120, file=""):
    """Makes the folder and holds its lock. The system releases it when this process ends.

    patience: seconds to wait for another writer before BadInput is raised
    file: hold the lock of this file in it alone, so that others may write its other files
    """
    folder = Path(folder)
    place = folder / file
    with at(f"{place}: cannot be made or locked (without locks, choose another disk)"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / (f".{file}.lock" if file else ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{place}: another process writes there; waiting up to {patience:g} s for it",
                  file=sys.stderr)
            lock.acquire(timeout=patience)

    try:
        # Temporary files of a killed writer are removed.
        patterns = (".*.tmp", "images/.*.tmp", "audio/.*.tmp")
        if file:
            patterns = (f".{glob.escape(file)}.*.tmp",)
        for pattern in patterns:
            for half in folder.glob(pattern):
                shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
