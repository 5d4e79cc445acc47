"""A saved model to open and to spoil, for all tests of files."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return the folder of a tiny Llama with its tokenizer, never to be changed."""
    pytest.importorskip("transformers")
    from peelwise.model.checkpoints import save_model
    from tiny_llama import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(tiny_llama(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Return a copy of it, the test's own."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


@pytest.fixture
def in_time():
    """Fail a test that takes longer than an answer may."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 30, "an answer takes seconds"


@pytest.fixture
def no_kernels(monkeypatch):
    """Fail a test that fetches a kernel."""

    def refuse(*names, **_):
        raise AssertionError(f"a kernel was fetched: {names}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", refuse)
