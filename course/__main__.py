"""Course work: a tree to hand out, and points for what comes back.

    python -m course handout DIR           # a student's tree: the parts' bodies are empty
    python -m course grade [DIR]           # of DIR, or here: a line a part, points, results.json
    python -m course grade --part embed    # one part alone; --extra: all, and the extra ones

`grade` takes the files of DIR that hold the parts, and all else from the tree that it runs in.
results.json has Gradescope's form. The exit code is 0 only if all is right, as GitHub Classroom
wants it. The student's code is run: use a container.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from course.handout import ALL, FILES, PARTS, copy_tree, write_handout
from plumbing.files import BadInput, readable_errors, write_text

SECONDS = 300  # a part may take so many; all take a few


def run_grader(tree, part):
    """Runs a part's grader in a tree. Returns what is wrong, in one line; "" if nothing is."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "--noconftest",
               "-p", "no:cacheprovider", f"tests/course/test_{part}.py"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True,
                              timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"took over {SECONDS} s"
    if done.returncode == 0:
        return ""
    error = re.search(r"(?m)^E   (?:AssertionError: |Failed: )?(\S.*)$", done.stdout)
    return error[1] if error else f"pytest ended with {done.returncode}: {done.stderr[-200:]}"


def grade(args):
    """Prints a line a part and the points, and writes them to args.out.

    Returns an exit code: 0 if all is right. Raises BadInput if a file with parts is not there.
    """
    folder, results = Path(args.folder), []
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise BadInput(f"{folder}: has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as tree:
        copy_tree(tree)
        for file in FILES:
            shutil.copyfile(folder / file, Path(tree) / file)
        for part in [args.part] if args.part else ALL if args.extra else PARTS:
            most, wrong = ALL[part][1], run_grader(tree, part)
            results.append({"name": part, "score": 0 if wrong else most, "max_score": most,
                            "status": "failed" if wrong else "passed", "output": wrong})
            print(f"{part:16}  {0 if wrong else most:3} of {most:3}  {wrong}".rstrip(), flush=True)

    score = sum(result["score"] for result in results)
    print(f"{'points':16}  {score:3} of {sum(result['max_score'] for result in results)}")
    write_text(args.out, json.dumps({"score": score, "tests": results}, indent=1) + "\n")
    return int(any(result["status"] == "failed" for result in results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m course",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    handout = commands.add_parser("handout", help="write a student's tree")
    handout.add_argument("folder", metavar="DIR", help="a new folder")
    grading = commands.add_parser("grade", help="give points")
    grading.add_argument("folder", metavar="DIR", nargs="?", default=".", help="a student's tree")
    grading.add_argument("--part", choices=ALL, metavar="NAME", help="grade one part alone")
    grading.add_argument("--out", default="results.json", help="where the points are written")
    for command in (handout, grading):
        command.add_argument("--extra", action="store_true", help="the extra parts, too")
    args = parser.parse_args()
    if args.command == "grade":
        sys.exit(grade(args))
    write_handout(args.folder, ALL if args.extra else PARTS)
    print(f"{args.folder}: a student's tree; its EXERCISES.md says how to go on")


if __name__ == "__main__":
    with readable_errors():
        main()
