"""Test the resolution of names to folders, with a fake hub."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mistral_kernels.checkpoint import CheckpointError, resolve

BOTH = ["config.json", "params.json", "tokenizer.model", "consolidated.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub(types.ModuleType):
    """Fake of the module `huggingface_hub` with one repository, online or offline."""

    def __init__(self, files: list[str], folder: Path, online: bool = True, cached: bool = False):
        super().__init__("huggingface_hub")
        self.files, self.folder, self.online, self.cached = files, folder, online, cached
        self.patterns: list[str] = []

    def list_repo_files(self, repo_id: str) -> list[str]:
        if not self.online:
            raise RuntimeError("404 Client Error.\n\nRepository Not Found")
        return self.files

    def snapshot_download(
        self,
        repo_id: str,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        if local_files_only and not self.cached:
            raise FileNotFoundError(repo_id)
        self.patterns = allow_patterns or []
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(BOTH + SHARDS, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def downloaded(hub: Hub) -> set[str]:
    """Return the files that match the patterns of the last download."""
    from fnmatch import fnmatch

    return {file for file in hub.files if any(fnmatch(file, each) for each in hub.patterns)}


def test_folders_are_returned_and_files_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model") == Path("owner/model")  # a folder is preferred to the hub
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; give the folder that holds"):
        resolve(tmp_path / "file")


def test_tiny_is_the_bundled_model() -> None:
    import mistral_kernels.checkpoint

    assert resolve("tiny") == Path(mistral_kernels.checkpoint.__file__).parent.parent / "tiny"


@pytest.mark.parametrize("name", ["nowhere", "/no/such", "./a", "../a", "a/b/c", "a b/c", "", "a/"])
def test_names_that_are_no_folder_and_no_hub_id_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder: '.*'; a hub id must have"):
        resolve(name)


def test_one_format_is_downloaded(hub: Hub) -> None:
    hub.files.append("model.fp8.safetensors")
    assert resolve("owner/model") == hub.folder
    assert downloaded(hub) == {"config.json", "tokenizer.model", *SHARDS}
    hub.files = [*BOTH, "consolidated.00.pth"]
    resolve("owner/model")
    assert downloaded(hub) == {"params.json", "tokenizer.model", "consolidated.safetensors"}
    beside = ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"]
    hub.files = ["params.json", "consolidated.00.pth", "tekken.json", *beside]
    resolve("owner/model")
    assert downloaded(hub) == set(hub.files)
    hub.files = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    resolve("owner/model")
    assert downloaded(hub) == {"config.json", "pytorch_model.bin"}
    hub.files = ["config.json", "model.gguf"]
    with pytest.raises(CheckpointError, match="hub model 'owner/model' has no weights in a suppo"):
        resolve("owner/model")


def test_cached_files_are_used_offline(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(
        CheckpointError, match="no such folder: 'owner/model', and the request to the hub failed"
    ) as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)
    hub.cached = True
    assert resolve("owner/model") == hub.folder


def test_retries_are_not_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the warnings are hidden during `resolve` only."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    hub.online, listed, loaded = False, hub.list_repo_files, hub.snapshot_download

    def warn(*_: Any) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")

    def list_repo_files(repo_id: str) -> list[str]:
        warn()
        return listed(repo_id)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        warn()
        return loaded(repo_id, **options)

    hub.list_repo_files = list_repo_files  # type: ignore[method-assign]
    hub.snapshot_download = snapshot_download  # type: ignore[method-assign]
    with pytest.raises(CheckpointError):
        resolve("owner/model")
    hub.online = True
    assert resolve("owner/model") == hub.folder
    assert caplog.messages == []
    warn()
    assert caplog.messages == ["Retrying in 1s [Retry 1/5]."]


def test_missing_huggingface_hub_raises_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mistral_kernels\[hf\]'"):
        resolve("owner/model")
