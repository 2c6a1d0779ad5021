"""Course work: a tree to hand out, and points for what comes back.

    python -m course handout DIR           # a student's tree: the parts' bodies are empty
    python -m course grade [DIR]           # of DIR, or here: a line a part, points, results.json
    python -m course grade --part embed    # one part alone; --extra: all, and the extra ones

`grade` takes the files of DIR that hold the parts, and all else from the tree that it runs in. A
part has points for its grader's tests that passed before the first that did not. results.json has
Gradescope's form, and is written after each part. The exit code is 0 only if all is right, as
GitHub Classroom wants it. The student's code is run: use a container.
"""

import argparse
import ast
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from course.handout import ALL, EXTRA, FILES, LAST, PARTS, ROOT, copy_tree, empty, write_handout
from course.sandbox import sandbox
from plumbing.files import readable_errors, write_text

# ---- what was handed in --------------------------------------------------------------------------


def handed_in(folder, temporary):
    """Returns {file: path, or the reason why there is none} of a student's folder.

    The files may lie in their folders, in a folder of its own, flat, or in a ZIP file.
    """
    archives = list(folder.glob("*.zip"))
    if archives and not any((folder / file).is_file() for file in FILES):
        try:
            shutil.unpack_archive(archives[0], temporary)
        except (OSError, zipfile.BadZipFile) as error:
            return dict.fromkeys(FILES, f"cannot be unpacked: {error}")
        folder = temporary
    return {file: look_for(folder, file) for file in FILES}


def look_for(folder, file):
    """Returns the path of a student's file, or the reason why there is none."""
    if (folder / file).is_file():
        return folder / file
    wanted, paths = Path(file), []
    for path in folder.rglob(wanted.name):
        if path.is_file() and not path.is_symlink():
            misplaced = not path.as_posix().endswith(f"/{file}")
            paths.append((misplaced, len(path.parts), path))
    best = [path for path in paths if path[:2] == min(paths)[:2]]
    if len(best) == 1:
        return best[0][2]
    return f"{len(best)} files are named {wanted.name}" if best else f"there is no {file}"


# ---- points --------------------------------------------------------------------------------------


def grader_tests(part):
    """Returns the names of a grader's tests, in order."""
    tree = ast.parse((ROOT / f"tests/course/test_{part}.py").read_text())
    return [node.name for node in tree.body if getattr(node, "name", "").startswith("test_")]


def count_passed(tests, told, end):
    """Returns how many tests passed before the first that did not, and what is wrong with that."""
    collected, bad, passed = [], {}, set()
    for facts in told:
        collected += facts.get("collected", [])
        if facts.get("outcome") == "passed":
            passed.add(facts["test"])
        elif "wrong" in facts:
            bad[facts.get("test", "")] = facts["wrong"]
    for number, test in enumerate(tests):
        cases = [case for case in collected if case.partition("[")[0] == test]
        for case in cases or [test]:
            if case not in passed or case in bad:
                return number, bad.get(case) or bad.get("") or f"{case}: {end}"
    return len(tests), ""


def grade_part(part, files, run):
    """Grades one part in a new tree, in which a file that was not handed in has empty parts.

    files: {file: path, or the reason why there is none}; run: of the sandbox
    Returns (points, what is wrong): "" if nothing is.
    """
    file, most = ALL[part]
    if isinstance(files.get(file), str):
        return 0, files[file]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        for name, path in files.items():
            if isinstance(path, str):
                empty(tree / name, [other for other in PARTS if ALL[other][0] == name])
            else:
                shutil.copyfile(path, tree / name)
        for path in (Path(folder), *filter(Path.is_dir, tree.rglob("*")), tree):
            path.chmod(0o755)  # another user reads it
        tests = grader_tests(part)
        passed, wrong = count_passed(tests, *run(tree, part))
    return most * passed // len(tests), wrong


def grade(args):
    """Prints a line a part and the points, and writes them to args.out after each part.

    Returns an exit code: 0 if all is right.
    """
    names = [args.part] if args.part else [*PARTS, *(EXTRA if args.extra else ()), *LAST]
    results = {name: {"name": name, "score": 0, "max_score": ALL[name][1], "status": "failed",
                      "output": "the grader was stopped before this part"} for name in names}
    with tempfile.TemporaryDirectory() as temporary, sandbox(args.user) as run:
        write_results(args.out, results)
        files = handed_in(Path(args.folder), Path(temporary))
        for name, result in results.items():
            score, wrong = 0, "runs when each of the parts has points"
            if name not in LAST or all(results[other]["score"] for other in names[:-1]):
                score, wrong = grade_part(name, files, run)
            result |= {"score": score, "status": "failed" if wrong else "passed", "output": wrong}
            write_results(args.out, results)
            print(f"{name:16}  {score:3} of {ALL[name][1]:3}  {wrong}".rstrip(), flush=True)

    score = sum(result["score"] for result in results.values())
    print(f"{'points':16}  {score:3} of {sum(ALL[name][1] for name in names)}")
    return int(any(result["status"] == "failed" for result in results.values()))


def write_results(path, results):
    """Writes results.json; its score is the sum of the parts'."""
    tests = list(results.values())
    score = sum(test["score"] for test in tests)
    write_text(path, json.dumps({"score": score, "tests": tests}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m course",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    handout = commands.add_parser("handout", help="write a student's tree")
    handout.add_argument("folder", metavar="DIR", help="a new folder")
    grading = commands.add_parser("grade", help="give points")
    grading.add_argument("folder", metavar="DIR", nargs="?", default=".", help="a student's files")
    grading.add_argument("--part", choices=ALL, metavar="NAME", help="grade one part alone")
    grading.add_argument("--out", default="results.json", help="where the points are written")
    grading.add_argument("--user", help="who runs the student's code (only root can say so)")
    for command in (handout, grading):
        command.add_argument("--extra", action="store_true", help="the extra parts, too")
    args = parser.parse_args()
    if args.command == "grade":
        sys.exit(grade(args))
    write_handout(args.folder, PARTS | EXTRA if args.extra else PARTS)
    print(f"{args.folder}: a student's tree; its EXERCISES.md says how to go on")


if __name__ == "__main__":
    with readable_errors():
        main()
