"""Files in GGUF form, the one of llama.cpp: what their header says, and whether they are whole.

transformers reads the weights; of a damaged file it says what only its authors understand, and it
leaves out parts of some files without a word. So what can be wrong with a file is found here first.
"""

import importlib.util
import math
import mmap
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zokernels.lab.errors import InputError

# Earlier ones make other tokens of a text than the file's own tokenizer does: transformers 5.17
# cuts Gemma's words to pieces, and up to 5.22 the token that begins every text is missing.
NEEDS_TRANSFORMERS = (5, 23)
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Of the header's types of values: what struct calls those of a fixed size; and the other two.
_FORMS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# Types that hold a number for each weight; the others are blocks, which share scales.
_PLAIN = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}
_FACTORS = ("rope_freqs.", "rope_factors_")


@dataclass(frozen=True)
class Tensor:
    """A tensor by the header: its name, its number of weights, and the name of their type."""

    name: str
    weights: int
    kind: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        path: The file.
        values: Its entries that are numbers or strings.
        tensors: Its tensors.
    """

    path: Path
    values: dict[str, Any]
    tensors: list[Tensor]

    @property
    def architecture(self) -> str:
        """Llama.cpp's name for the kind of model."""
        return str(self.values.get("general.architecture"))

    def check_read(self, config: Any) -> None:
        """Refuses the configuration that was made of it if positions would be read otherwise.

        Raises:
            InputError: If so.
        """
        kind = self.values.get(f"{self.architecture}.rope.scaling.type", "none")
        factor = self.values.get(f"{self.architecture}.rope.scaling.factor", 1)
        if kind != "none" and factor != 1 and not _is_scaled(config):
            raise InputError(
                f"{self.path} scales its rotary positions ({kind}, factor {factor}), which "
                "transformers does not read from such a file; name a folder made by "
                "save_pretrained."
            )

    def notes(self, dtype: str, config: Any) -> list[str]:
        """What the user should know of a model that was read from it as ``dtype``."""
        packed = [t for t in self.tensors if t.kind not in _PLAIN]
        said = []
        if packed:
            kinds = ", ".join(sorted({t.kind for t in packed}))
            said.append(
                f"{self.path.name} is quantised: {sum(t.weights for t in packed):,} of its "
                f"{sum(t.weights for t in self.tensors):,} weights ({kinds}) were dequantised into "
                f"{dtype}, and so they are trained and saved."
            )
        factors = [t.name for t in self.tensors if t.name.startswith(_FACTORS)]
        if factors and not _is_scaled(config):
            said.append(
                f"transformers leaves out the file's factors of rotary frequencies "
                f"({', '.join(factors)}), so that texts score otherwise than by the original, long "
                "ones most."
            )
        return said


def is_meant(path: Path) -> bool:
    """Whether a path names a file of this form, by its end or by how the file begins."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def check_installed(version: str) -> None:
    """Refuses to go on without what reads such files.

    Args:
        version: That of transformers.

    Raises:
        InputError: If something is missing or too old.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            "A GGUF file needs the package gguf, which is not installed: "
            "pip install 'zokernels[gguf]'."
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < NEEDS_TRANSFORMERS:
        raise InputError(
            f"A GGUF file needs transformers {'.'.join(map(str, NEEDS_TRANSFORMERS))} or later, "
            f"since earlier ones make wrong tokens of its texts, and {version} is installed: "
            "pip install -U 'zokernels[gguf]'."
        )


@contextmanager
def alone(path: Path) -> Iterator[tuple[str, str]]:
    """The file as the only one of a folder: that folder, and the file's name there.

    transformers takes a tokenizer or an adapter that lies beside the file for the file's own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "model.gguf").symlink_to(path.resolve())
        yield scratch, "model.gguf"


def read(path: Path) -> Header:
    """The header of a file that is whole, and holds a whole model.

    Raises:
        InputError: If it is not.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
            if begin != _MAGIC:
                raise InputError(
                    f"{path} is not in GGUF form: it begins with {begin!r}, where such a file has "
                    f"{_MAGIC!r}; name another."
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _header(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except _DamageError as error:
        raise InputError(
            f"{path} is damaged or not complete ({error}); remove it, and get it again."
        ) from None
    _check_meant(header)
    return header


class _DamageError(Exception):
    """What is wrong with a file, in a few words."""


class _Cursor:
    """The bytes of a file, taken in turn."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, len(_MAGIC)

    def number(self, form: str) -> Any:
        """A number of a form of `struct`."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self._pass(struct.calcsize(form)))
        return value

    def text(self) -> str:
        """A string, before which stands its length."""
        length = self.number("Q")
        start = self._pass(length)
        return self.data[start : start + length].decode(errors="replace")

    def value(self, kind: int) -> Any:
        """A value of a type by its number; None for an array, which is passed over."""
        if kind in _FORMS:
            return self.number(_FORMS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _DamageError(f"there is no type {kind} of values")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):
                self._pass(self.number("Q"))
        elif inner in _FORMS:
            self._pass(count * struct.calcsize(_FORMS[inner]))
        else:
            raise _DamageError(f"there is no array of type {inner}")
        return None

    def _pass(self, count: int) -> int:
        """Where the next so many bytes begin."""
        start, self.place = self.place, self.place + count
        if self.place > len(self.data):
            raise _DamageError("its header goes on behind its end")
        return start


def _header(path: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise InputError(
            f"{path} is of version {version} of GGUF, and only {' and '.join(map(str, _VERSIONS))} "
            "in little-endian order can be read; convert the model again."
        )
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text()
        values[key] = cursor.value(cursor.number("I"))
    found, ends = [], [0]
    for _ in range(tensors):
        name = cursor.text()
        if not 1 <= (dimensions := cursor.number("I")) <= _MOST_DIMENSIONS:
            raise _DamageError(f"the tensor {name} has {dimensions} dimensions")
        shape = [cursor.number("Q") for _ in range(dimensions)]
        kind, size = _size(path, name, shape, cursor.number("I"))
        found.append(Tensor(name, math.prod(shape), kind))
        ends.append(cursor.number("Q") + size)
    step = values.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise _DamageError(f"its general.alignment is {step!r}")
    whole = -(-cursor.place // step) * step + max(ends)
    if whole > len(data):
        raise _DamageError(f"it has {len(data):,} bytes, and its tensors need {whole:,}")
    if not found:
        raise _DamageError("it has no tensor")
    return Header(path, values, found)


def _size(path: Path, name: str, shape: list[int], number: int) -> tuple[str, int]:
    """The name of a tensor's type, and its bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise InputError(
            f"{path}: the tensor {name} is of type {number}, which the installed gguf does not "
            "know; pip install -U gguf, or get the file again."
        ) from None
    if shape[0] % block:
        raise _DamageError(f"the tensor {name} of type {kind.name} has the shape {shape[::-1]}")
    return kind.name, math.prod(shape) // block * size


def _check_meant(header: Header) -> None:
    """Refuses a whole file that is no whole model."""
    path, values = header.path, header.values
    parts = values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"{path} is one of {parts} parts of a model; join them with llama.cpp's "
            "gguf-split --merge, and name the whole."
        )
    if (kind := values.get("general.type", "model")) != "model":
        raise InputError(f"{path} holds no model but is of type '{kind}'; name a model's file.")


def _is_scaled(config: Any) -> bool:
    """Whether a configuration scales rotary positions, for all of its layers or some kind."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(part for part in given.values() if isinstance(part, dict))]
    return any(part.get("rope_type", "default") != "default" for part in kinds)
