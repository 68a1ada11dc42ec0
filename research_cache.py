"""List what is in the cache, and delete what is no longer wanted.

    python research_cache.py list
    python research_cache.py prune --kind layers --older_than 30
    python research_cache.py prune --keep_gb 50

An entry that is being built, or that a running process works with, stays. Whatever is deleted is made again by the next
run that needs it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from research.errors import FAILED, InputError, describe_os_error
from research.flags import add_completion
from research.logs import accept_any_text, print_result, report_bad_input
from research.storage.cache import list_used
from research.storage.files import check_working_folder
from research.storage.inventory import Entry, choose_entries, delete_entry, list_entries


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--cache_dir", type=os.path.expanduser, default="cache", metavar="FOLDER", help="the cache (default: cache)"
    )
    common.add_argument(
        "--kind", action="append", metavar="NAME", help="only this kind, as tokens, teachers, logits, layers, words"
    )
    parser = argparse.ArgumentParser(
        prog="research_cache.py",
        description=__doc__,
        epilog="Exit status: 0 done, 1 failed while running, 2 bad flags or input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|prune")
    commands.add_parser("list", parents=[common], help="size, age and origin of every entry, the oldest first")
    prune = commands.add_parser("prune", parents=[common], help="delete entries", allow_abbrev=False)
    prune.add_argument("--older_than", type=limit, metavar="DAYS", help="entries finished more than so many days ago")
    prune.add_argument("--keep_gb", type=limit, metavar="GB", help="the oldest, until at most so many GB (10^9 bytes) are left")
    prune.add_argument("--dry_run", action="store_true", help="say what would be deleted, and stop")
    return parser


def limit(text: str) -> float:
    """Read a number of days or GB, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """List or prune; returns the exit status, 2 for a user's mistake, which is named in one line."""
    accept_any_text()
    arguments = build_parser().parse_args(argv)
    root = Path(arguments.cache_dir)
    try:
        check_working_folder()
        entries = find_entries(root, arguments.kind)
        if arguments.command == "list":
            return print_result(describe(entries, root, "entries"))
        return prune(arguments, entries, root)
    except InputError as error:
        return report_bad_input(error)
    except OSError as error:
        print(f"error: {describe_os_error(error, str(root))}", file=sys.stderr)
        return FAILED


def find_entries(root: Path, kinds: Sequence[str] | None) -> list[Entry]:
    """Return the entries of some kinds, of all without.

    Raises:
        InputError: there is no cache, or nothing of a kind.
    """
    if not root.is_dir():
        raise InputError(f"--cache_dir: no such folder: {root}. Give the --cache_dir of your runs.")
    entries = list_entries(root)
    there = {entry.kind for entry in entries}
    if missing := sorted(set(kinds or ()) - there):
        raise InputError(f"--kind: {root} holds no {missing[0]}; there are {', '.join(sorted(there)) or 'none'}.")
    return [entry for entry in entries if kinds is None or entry.kind in kinds]


def prune(arguments: argparse.Namespace, entries: Sequence[Entry], root: Path) -> int:
    """Delete what the flags choose of some entries; return the exit status.

    Raises:
        InputError: the flags choose nothing, so that all would go.
    """
    if arguments.older_than is None and arguments.keep_gb is None and not arguments.kind:
        raise InputError("prune: say what may go: --older_than, --keep_gb or --kind (to delete all, delete the folder).")
    chosen = choose_entries(entries, time.time(), arguments.older_than, arguments.keep_gb)
    if arguments.dry_run:
        return print_result(describe(chosen, root, "entries would be deleted"))
    deleted = []
    for entry in chosen:
        if delete_entry(entry, root):
            deleted.append(entry)
        else:
            print(f"{entry.name}: in use, left alone", file=sys.stderr)
    return print_result(describe(deleted, root, "entries deleted"))


def describe(entries: Sequence[Entry], root: Path, what: str) -> str:
    """Return a line for each entry, and one for all of them."""
    used, now_s = list_used(root), time.time()
    lines = [
        f"{entry.size / 1e6:10.1f} MB  {(now_s - entry.written_s) / 86400:6.1f} days  {entry.name}"
        f"{'  in use' if entry.name.partition('.')[0] in used else ''}  {entry.origin}"
        for entry in entries
    ]
    total = sum(entry.size for entry in entries)
    return "\n".join([*lines, f"{root}  {len(entries)} {what}, {total / 1e9:.3f} GB"])


if __name__ == "__main__":
    sys.exit(main())
