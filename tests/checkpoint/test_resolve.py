"""Resolution of names to folders; a small stand-in is the hub."""

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
    """`huggingface_hub` with one repository, online or offline, cached or not."""

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


def taken(hub: Hub) -> set[str]:
    from fnmatch import fnmatch

    return {file for file in hub.files if any(fnmatch(file, each) for each in hub.patterns)}


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model") == Path("owner/model")  # a folder goes before the hub
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; give the folder that holds"):
        resolve(tmp_path / "file")


def test_tiny_is_the_bundled_model() -> None:
    import mistral_kernels.checkpoint

    assert resolve("tiny") == Path(mistral_kernels.checkpoint.__file__).parent.parent / "tiny"


@pytest.mark.parametrize("name", ["nowhere", "/no/such", "./a", "../a", "a/b/c", "a b/c", "", "a/"])
def test_neither_folder_nor_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder: '.*' \(nor is it a hub id"):
        resolve(name)


def test_one_format_is_downloaded(hub: Hub) -> None:
    hub.files.append("model.fp8.safetensors")
    assert resolve("owner/model") == hub.folder
    assert taken(hub) == {"config.json", "tokenizer.model", *SHARDS}
    hub.files = [*BOTH, "consolidated.00.pth"]
    resolve("owner/model")
    assert taken(hub) == {"params.json", "tokenizer.model", "consolidated.safetensors"}
    beside = ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"]
    hub.files = ["params.json", "consolidated.00.pth", "tekken.json", *beside]
    resolve("owner/model")
    assert taken(hub) == set(hub.files)
    hub.files = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    resolve("owner/model")
    assert taken(hub) == {"config.json", "pytorch_model.bin"}
    hub.files = ["config.json", "model.gguf"]
    with pytest.raises(CheckpointError, match="hub model 'owner/model' has no weights in a format"):
        resolve("owner/model")


def test_offline(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(
        CheckpointError, match="no such folder: 'owner/model', and the hub"
    ) as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)
    hub.cached = True
    assert resolve("owner/model") == hub.folder


def test_retries_are_not_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """huggingface_hub warns of each attempt; only inside our calls is that hidden."""
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


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mistral_kernels\[hf\]'"):
        resolve("owner/model")
