"""Whether the tests passed for the code that is measured.

A test run keeps its outcome in pytest's cache, under a fingerprint of the package's files, the
native library and the versions that run them. Rows of a benchmark say what is kept there for the
code as it is now.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
KEY = "zokernels/tested"
PASSED, FAILED, NOT_RUN, NO_CHECKOUT = "passed", "failed", "not run", "no checkout"
_PLACES = ("zokernels", "csrc", "setup.py")
_OTHERS = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def is_checkout(root: Path = ROOT) -> bool:
    """Whether the package lies in a folder with its own tests."""
    return (root / "tests" / "conftest.py").exists() and (root / "csrc").is_dir()


def fingerprint(root: Path = ROOT) -> str:
    """A digest of the files whose code is tested and measured, and of Python's and torch's version.

    It covers the native library as built, and changes that are not committed.
    """
    digest = hashlib.sha256(f"{platform.python_version()} {torch.__version__}".encode())
    for place in _PLACES:
        top = root / place
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for file in files:
            name = file.relative_to(root)
            if not _OTHERS & set(name.parts):
                digest.update(f"\0{name.as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def outcome(root: Path = ROOT) -> str:
    """What a row's column ``tests`` says.

    Returns:
        "passed": a complete run of the tests passed for this very code. "failed": a test of the
        last run that had an outcome for it failed. "not run": there is no outcome for this code.
        "no checkout": the package is installed apart from its tests.
    """
    if not is_checkout(root):
        return NO_CHECKOUT
    try:
        # Where pytest's cache keeps the values that plugins set.
        kept = json.loads((root / ".pytest_cache" / "v" / KEY).read_text(encoding="utf-8"))
        same = kept["fingerprint"] == fingerprint(root)
        return kept["outcome"] if same and kept["outcome"] in (PASSED, FAILED) else NOT_RUN
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_RUN
