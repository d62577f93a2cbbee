"""Models that come inside of packages of the Python package index.

A package is found, not imported. The exception is one that holds a model in parts, with a function
``assemble(path)`` that joins them: that function is run, for a package that the user has named.
"""

import ast
import hashlib
import importlib
import importlib.util
import os
import tempfile
from importlib import metadata
from pathlib import Path

from zokernels.lab import files
from zokernels.lab.errors import InputError

PREFIX = "package:"
_JOINER = "assemble"


def located(name: str) -> str:
    """Where the model of ``package:NAME/INSIDE`` is; of any other ``name``, that itself.

    It is the folder NAME/INSIDE with a ``config.json``, the file of that name in GGUF form, or the
    only such file below it. Where a package has none of these and joins its parts, it is the file
    that `joined` writes, whether or not it is there yet.

    Raises:
        InputError: If there is no such package, or not one such model in it.
    """
    if not name.startswith(PREFIX):
        return name
    package, _, inside = name.removeprefix(PREFIX).partition("/")
    for place in _places(package):
        path = place / inside
        if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".gguf"):
            return str(path)
        files = sorted(path.rglob("*.gguf"))
        if len(files) > 1:
            known = ", ".join(str(file.relative_to(place)) for file in files)
            raise InputError(f"--model {name} could be any of {known}; name one of them.")
        if files:
            return str(files[0])
    if not inside and _joins(package):
        return str(cache() / f"{package}-{_mark(package)}.gguf")
    raise InputError(
        f"--model {name}: there is no installed package '{package}' with a model in "
        f"'{inside or '.'}'; install it, or name a folder."
    )


def joined(name: str) -> str:
    """Where the model of any ``name`` is, once its package has joined it if that is how it comes.

    The file is written whole or not at all, and the next call finds it.

    Raises:
        InputError: As `located` does; and if the package's function fails.
    """
    path = Path(located(name))
    if not name.startswith(PREFIX) or path.exists():
        return str(path)
    package = name.removeprefix(PREFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{package}.") as scratch:
            draft = Path(scratch) / path.name
            getattr(importlib.import_module(package), _JOINER)(draft)
            files.sync(draft)
            os.replace(draft, path)
    except Exception as error:
        # Its code is anyone's, and so are its errors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--model {name}: the package's own function {_JOINER} did not write {path}: {reason}"
        ) from None
    return str(path)


def cache() -> Path:
    """The folder for files that packages join, by the XDG base directories; it may be absent."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # By their specification a relative path is as good as none.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "zokernels"


def _places(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _source(package: str) -> Path | None:
    """The file that importing the package would run, if it is one to read."""
    found = [place / "__init__.py" for place in _places(package)]
    return next((path for path in found if path.is_file()), None)


def _joins(package: str) -> bool:
    """Whether its source has the function, which is read and not run."""
    source = _source(package)
    try:
        body = ast.parse(source.read_bytes()).body if source else []
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(part, ast.FunctionDef) and part.name == _JOINER for part in body)


def _mark(package: str) -> str:
    """What tells one release of a package from another, so that none is taken for the next."""
    source = _source(package)
    known = hashlib.sha256(source.read_bytes() if source else b"")
    for distribution in sorted(metadata.packages_distributions().get(package, ())):
        known.update(f"{distribution} {metadata.version(distribution)}".encode())
    return known.hexdigest()[:12]
