"""YAML files of the user's, whose errors name the file, the line and the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zokernels.lab.errors import InputError, shown


class Keys(dict[Any, Any]):
    """A mapping of the file that knows on which line each of its keys stands."""

    lines: dict[Any, int]


def read(path: Path, what: str) -> str:
    """A file's text.

    Args:
        path: Where.
        what: What it is called where it can't be read.

    Raises:
        InputError: If it can't.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"The {what} {path} cannot be read: {reason}.") from None


def load(text: str, path: Path, what: str, texts_only: bool = False) -> Any:
    """What a YAML text holds; its mappings are `Keys`.

    Args:
        text: The YAML.
        path: Where it came from, for errors.
        what: What the file is called there.
        texts_only: Leave numbers, dates and yes and no the texts that they are in the file.

    Raises:
        InputError: If it is no YAML, a key is there twice, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise InputError(
            f"A {what} needs PyYAML, which is not installed: pip install 'zokernels[hf]'."
        ) from None
    base = yaml.BaseLoader if texts_only else yaml.SafeLoader

    class Loader(base):  # type: ignore[misc, valid-type]
        """YAML without its silence about a key that is there twice."""

    def mapping(loader: Any, node: Any) -> Keys:
        found, lines = Keys(), {}
        for at, value in node.value:
            key, line = loader.construct_object(at), at.start_mark.line + 1
            if key in lines:
                raise InputError(f"{path}, line {line}: the key {key} is there twice; keep one.")
            lines[key], found[key] = line, loader.construct_object(value, deep=True)
        found.lines = lines
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{path}{line} is no YAML: {problem}.") from None
    except TypeError as error:
        raise InputError(f"{path} is no {what}: {error}.") from None
    finally:
        loader.dispose()


def mapping(given: Any, path: Path, where: str) -> Mapping[str, Any]:
    """What must hold keys and values.

    Raises:
        InputError: If it does not.
    """
    if not isinstance(given, Mapping):
        got = "nothing" if given is None else shown(given)
        raise InputError(f"{path}: {where} must hold keys and values, got {got}.")
    return given


def known(given: Mapping[str, Any], allowed: Collection[str], path: Path, where: str) -> None:
    """Refuses a key that means nothing.

    Raises:
        InputError: Naming it, its line and those that are allowed.
    """
    for key in given:
        if key not in allowed:
            raise InputError(
                f"{place(given, key, path)}: there is no key {where}{key}; allowed are "
                f"{', '.join(sorted(allowed))}."
            )


def place(given: Mapping[str, Any], key: str, path: Path) -> str:
    """File and, as far as it is known, line of a key."""
    lines = getattr(given, "lines", {})
    return f"{path}, line {lines[key]}" if key in lines else str(path)
