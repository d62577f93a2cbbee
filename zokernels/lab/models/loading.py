"""Loading a model and its tokenizer, from a folder or a file first."""

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zokernels.lab import hub
from zokernels.lab.errors import InputError
from zokernels.lab.models import gguf_file, packages, quantised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {"causal": "a causal LM", "masked": "a masked LM", "encoder": "a sentence encoder"}
FACTORIES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
}
# Code that comes with a model is never run; said outright, since else transformers would ask.
_OPTIONS: dict[str, Any] = {"trust_remote_code": False}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Loaded:
    """A model ready to be scored.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer, which has a padding token.
        kind: "causal", "masked" or "encoder".
        notes: Sentences the user should see.
    """

    model: Any
    tokenizer: Any
    kind: str
    notes: list[str]


def load(
    name: str, dtype: str = "float32", load_in: str | None = None, device: str = "cpu"
) -> Loaded:
    """The model called ``name``.

    Args:
        name: A folder made by ``save_pretrained``, a file in GGUF form, ``package:NAME/INSIDE``, or
            a name on the hub.
        dtype: One of `DTYPES`.
        load_in: One of `quantised.KINDS`, for a base that stays frozen.
        device: Where to load a quantised one, which can't be moved; others are loaded on the CPU.

    Raises:
        InputError: If it cannot be had, or is of no kind that can be scored.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    try:
        import transformers
    except ImportError:
        raise InputError(
            "Fine-tuning needs transformers, which is not installed: pip install 'zokernels[hf]'."
        ) from None
    more = {} if load_in is None else quantised.options(load_in, DTYPES[dtype], device)
    path = Path(packages.joined(name)).expanduser()
    if gguf_file.is_meant(path):
        if more:
            raise InputError(
                f"--load-in {load_in}: a file in GGUF form has its own form of few bits, which is "
                "undone when it is read; name a model's folder or its name on the hub."
            )
        return _read_file(transformers, path, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} has no config.json, so it is not a model folder; "
                "pass one made by save_pretrained."
            )
        return _read(transformers, str(path), DTYPES[dtype], more, cached=True)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"There is no model folder {name}; pass a folder made by save_pretrained, a file in "
            "GGUF form, or the name of a model on the hub."
        )
    try:
        return _read(transformers, name, DTYPES[dtype], more, cached=True)
    except InputError:
        why = hub.unreachable()
        if why is None:
            return _read(transformers, name, DTYPES[dtype], more, cached=False)
    raise InputError(
        f"Model '{name}' is neither a folder nor in the local cache of the hub, and the hub was "
        f"not used: {why}."
    )


def kind_of(architecture: str) -> str:
    """How a checkpoint with this architecture is scored, by the head that its name says it has."""
    from transformers.models.auto import modeling_auto as auto

    if architecture in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    if architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    if architecture in auto.MODEL_MAPPING_NAMES.values():
        return "encoder"
    raise InputError(
        f"A checkpoint of architecture {architecture} cannot be scored; it must be a causal LM, "
        "a masked LM, or an encoder without a head."
    )


def _read(
    transformers: Any, name: str, dtype: torch.dtype, more: dict[str, Any], *, cached: bool
) -> Loaded:
    options = dict(local_files_only=cached, **_OPTIONS)
    # A damaged folder fails in many ways: OSError, ValueError, the safetensors error, KeyError.
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        kind = kind_of((config.architectures or ["None"])[0])
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model, info = getattr(transformers, FACTORIES[kind]).from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options, **more
        )
        if more:
            quantised.settle(model.eval())
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Model {name} could not be loaded: {_reason(error)}") from None
    notes = []
    if missing := sorted(info.get("missing_keys", [])):
        notes.append(
            f"{len(missing)} tensors are not in the checkpoint and start random, "
            f"{missing[0]} among them."
        )
    return _checked(name, Loaded(model, tokenizer, kind, notes))


def _read_file(transformers: Any, path: Path, dtype: str) -> Loaded:
    """The model in a file in GGUF form, dequantised, so that it can be trained and saved."""
    if not path.is_file():
        raise InputError(
            f"There is no file {path}; pass one in GGUF form, a folder made by save_pretrained, or "
            "the name of a model on the hub."
        )
    gguf_file.check_installed(transformers.__version__)
    header = gguf_file.read(path)
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with gguf_file.alone(path) as (folder, file):
        options = dict(local_files_only=True, gguf_file=file, **_OPTIONS)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **options)
            header.check_read(config)
            # Most such files name a type of models only, and they hold language models.
            named = names.get(config.model_type, config.model_type)
            kind = kind_of((config.architectures or [named])[0])
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            # Its progress bar is no affair of `quiet`.
            with contextlib.redirect_stderr(io.StringIO()):
                model, info = getattr(transformers, FACTORIES[kind]).from_pretrained(
                    folder,
                    config=config,
                    dtype=DTYPES[dtype],
                    quantization_config=transformers.GgufConfig(dequantize=True),
                    output_loading_info=True,
                    **options,
                )
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"transformers could not read {path}, of architecture '{header.architecture}': "
                f"{_reason(error).rstrip('.')}. Pass a folder made by save_pretrained in its place."
            ) from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{path} lacks {len(missing)} tensors of its model, {missing[0]} among them; get a "
            "whole one, or pass a folder made by save_pretrained."
        )
    # Adapters and probes keep where their base was.
    model.name_or_path = model.config.name_or_path = str(path.resolve())
    return _checked(str(path), Loaded(model, tokenizer, kind, header.notes(dtype, config)))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checked(name: str, loaded: Loaded) -> Loaded:
    """A model that can be scored: in evaluation mode, and with a padding token."""
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"The tokenizer of {name} has no padding, end or unknown token.")
    _check_vocabulary(name, tokenizer, loaded.model)
    loaded.model.eval()
    return loaded


def quiet() -> None:
    """Keeps transformers' own progress bars, reports and deprecations out of a run's output."""
    # Of peft's and its own making.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch.nn")
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _check_vocabulary(name: str, tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise InputError(
            f"The tokenizer of {name} does not fit its model: {len(beyond)} of its tokens are "
            f"beyond the {rows} embeddings, '{token}' (number {beyond[token]}) among them; use the "
            "tokenizer that the model was trained with."
        )
