"""What the tests of several rooms share."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from stamp import pytest_sessionfinish, pytest_sessionstart  # noqa: F401
from tiny import build

from zokernels.backends import native

# `pytest --hypothesis-profile deep -k fuzz` searches 20 times as long. Where the variable CI is set
# hypothesis takes its own profile "ci": ours stands in for it, so that a test is held to the same
# rules everywhere, and there the examples are the same in every run.
_COMMON = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("default", max_examples=50, **_COMMON)
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("deep", max_examples=1000, **_COMMON)

# Triton decides when it is imported whether kernels are interpreted.
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" else ["engine/backends/interpreted"]
)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns as integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(kinds[t.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, where of a NaN only that it is one counts."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def varied(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Weights of many magnitudes, subnormals, zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 4, (numel,), generator=generator).float()
    w = torch.randn(numel, generator=generator) * torch.exp2(exponents)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3e38, 6e4, 1e-44])
    w[5::61] = special[torch.arange(len(w[5::61])) % len(special)]
    return w.to(dtype)


needs_native = pytest.mark.skipif(
    native.why_missing() is not None,
    reason=f"needs the native backend: {native.why_missing()}",
)


@pytest.fixture(scope="module", autouse=True)
def without_gpu(request):
    """Outside tests/gpu no test sees a GPU: what it finds depends on no machine."""
    if request.path.parent.name == "gpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For a module: matrices this small only wait for a second thread, and sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Tiny models by kind, and a data folder whose classes differ by a word."""
    root = tmp_path_factory.mktemp("places")
    for kind in ("opt", "bert", "roberta"):
        build(kind, root / kind)
    words = ["film", "movie", "plot", "heart", "one", "this film", "the plot", "every one"]
    rows = [
        (f"{lead} {word} {tail}", int(tail in ("good", "fine")))
        for lead in ("the", "a very", "this", "i", "and the")
        for word in words
        for tail in ("good", "fine", "bad", "dull")
    ]
    text = "sentence\tlabel\n" + "".join(f"{s} \t{label}\n" for s, label in rows)
    (root / "train.tsv").write_text(text)
    (root / "dev.tsv").write_text(text)
    return root
