"""The hub, asked once and briefly, so that a machine without a network does not wait."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 3.0


def fetcher(repo: str, revision: str | None) -> Callable[[str, bool], Path]:
    """A function from (file, from the cache only) to the local path of a data set's file.

    Raises:
        ImportError: If the hub's client or a reader of its files is not installed.
    """
    import pyarrow.parquet  # noqa: F401
    from huggingface_hub import hf_hub_download

    def fetch(name: str, cached: bool) -> Path:
        found = hf_hub_download(
            repo, name, repo_type="dataset", revision=revision, local_files_only=cached
        )
        return Path(found)

    return fetch


def unreachable(timeout: float = _PATIENCE) -> str | None:
    """Why the hub cannot be used, or None if it answers within ``timeout`` seconds.

    The hub's own client repeats a failed request for some 23 s, so this asks first. It runs in a
    thread because the resolver of host names does not honour a socket's timeout.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "").strip().upper()
    if offline in {"1", "TRUE", "YES", "ON"}:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answers: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                answers.append(None)
        except urllib.error.HTTPError as error:
            answers.append(None if error.code < 500 else f"{endpoint} answered {error.code}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answers.append(f"{endpoint} could not be reached ({reason})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else f"{endpoint} did not answer within {timeout:g} s"
