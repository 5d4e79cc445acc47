"""transformers at work inside bounds: silent, offline, without kernels of others, and with our reader of GGUF files."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from peelwise.errors import MissingExtraError, ModelError
from peelwise.model.checkpoint_files import brief, check_folder, read_json
from peelwise.model.weights.gguf_reader import FileReader, dequantize

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


def require_transformers() -> Any:
    """Return the package transformers.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("Opening a Hugging Face model", "hf") from error
    return transformers


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Let loaders work without output, network or kernels of others, and with our reader of GGUF files.

    What a checkpoint may name is checked before. This holds for what an architecture would fetch by itself.
    """
    require_transformers()
    with quiet(), contextlib.ExitStack() as stack:
        from huggingface_hub import constants
        from transformers.integrations import hub_kernels

        stack.enter_context(_replaced(constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(_replaced(hub_kernels, "get_kernel_hub", _refuse_kernel))
        if find_spec("kernels") is not None:
            stack.enter_context(_replaced(importlib.import_module("kernels"), "get_kernel", _refuse_kernel))
        if find_spec("gguf") is not None:
            _read_quickly(stack)
        yield


def load_tokenizer(folder: Path, gguf_file: str | None) -> Any | None:
    """Return the tokenizer of a folder or GGUF file, ``None`` if there is none.

    Raises:
        ModelError: If it is damaged, or needs code of its own.
    """
    # Without a vocabulary, some tokenizer classes come up empty and encode every text to nothing.
    if gguf_file is None and not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        return None
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is None:
        check_folder(folder)
        _check_settings(folder / "tokenizer_config.json")
    try:
        with quiet():
            return require_transformers().AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
    except Exception as error:  # loaders raise anything; the user can act on the file, not on the traceback
        raise ModelError(
            f"The tokenizer in {folder} cannot be opened: {brief(error)}. Mend it, or open the model without it."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice of the loaders; what matters is raised."""
    logging = require_transformers().logging
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws its own bar on standard error, past the switch above.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _check_settings(file: Path) -> None:
    """Check that a tokenizer's settings name no code and no file elsewhere; its template is text, and never run."""
    if not file.exists():
        return
    settings = read_json(file)
    if settings.get("init_inputs"):
        raise ModelError(
            f"{file}: init_inputs would be given to the tokenizer as they are, files among them: expected none. "
            "Save the tokenizer again."
        )
    for key, value in settings.items():
        if key != "fast_tokenizer_files":
            continue
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or PurePath(name).name != name:
                raise ModelError(f"{file}: {key} names {str(name)[:80]!r}: expected files beside it. Save it again.")
    code = settings.get("auto_map")
    if code and not _is_known(settings.get("tokenizer_class")):
        raise ModelError(
            f"{file} names Python code that comes with the tokenizer, which is never run: expected a tokenizer that "
            "transformers has itself. Give the folder of such a one with --tokenizer, or open the model without it."
        )


def _is_known(name: Any) -> bool:
    return isinstance(name, str) and hasattr(require_transformers(), name)


def _refuse_kernel(*names: Any, **_: Any) -> Any:
    raise ModelError(
        f"A kernel of others was asked for while a model was opened ({str(names[:1])[:80]}), which is never loaded."
    )


def _read_quickly(stack: contextlib.ExitStack) -> None:
    """Give the loaders our reader of GGUF files for that of the package, and its table of names once; seconds each."""
    import gguf

    stack.enter_context(_replaced(gguf, "GGUFReader", FileReader))
    stack.enter_context(_replaced(gguf, "dequantize", dequantize))
    stack.enter_context(_replaced(gguf, "get_tensor_name_map", functools.lru_cache(gguf.get_tensor_name_map)))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's attribute another value for a while, where it has it."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
