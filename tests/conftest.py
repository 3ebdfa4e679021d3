"""Fixtures that several test files share."""

import pytest
import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model, shards and tokenizer, which is the current one during the test."""
    monkeypatch.chdir(tiny.make_folder(tmp_path / "run"))
    return tmp_path / "run"
