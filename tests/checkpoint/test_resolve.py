"""Test the resolution of names to folders, with a fake hub."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from support.local_hub import Refusal, serving

from mistral_kernels.checkpoint import CheckpointError, resolve
from mistral_kernels.checkpoint.hub import resolve_tokenizer
from mistral_kernels.checkpoint.hub_download import download

tqdm = pytest.importorskip("huggingface_hub.utils").tqdm

BOTH = ["config.json", "params.json", "tokenizer.model", "consolidated.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub(types.ModuleType):
    """Fake of the module `huggingface_hub` with one repository, online or offline."""

    def __init__(self, files: list[str], folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.files, self.folder, self.online = files, folder, True
        self.requests: list[dict[str, Any]] = []  # arguments of each call that made a request

    def model_info(self, repo_id: str, **options: Any) -> types.SimpleNamespace:
        self.requests.append({"repo_id": repo_id, **options})
        if not self.online:
            raise ConnectionError("Name or service\n not known")
        return types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=name) for name in self.files]
        )

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        if options.pop("local_files_only", False):
            self.requests.append(options)
            wanted = [file for file in self.files if matches(file, options["allow_patterns"])]
            if not all((self.folder / file).exists() for file in wanted):
                raise IncompleteSnapshotError(repo_id)
            return str(self.folder)
        assert issubclass(options.pop("tqdm_class"), tqdm)
        self.requests.append({"repo_id": repo_id, **options})
        return str(self.folder)


class IncompleteSnapshotError(Exception):
    """Error of huggingface_hub, which is recognized by its name."""


def matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch(file, each) for each in patterns)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(BOTH + SHARDS, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def downloaded(hub: Hub) -> set[str]:
    """Return the files that match the patterns of the last download."""
    return {file for file in hub.files if matches(file, hub.requests[-1]["allow_patterns"])}


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
    with pytest.raises(CheckpointError, match=r"file is a file; give the folder that holds .*, /"):
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md", "m.Q4_K_M.gguf"], "holds GGUF weights, which are not supported; give the"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds a PEFT adapter without its "),
        (["model_index.json", "unet/model.safetensors"], "holds a diffusers pipeline; give a che"),
        (["config.json", "tf_model.h5"], "holds weights of ONNX, TensorFlow or Flax, which are no"),
        (["config.json"], r"has no weights: expected model\*.safetensors, consolidated\*.safetens"),
    ],
)
def test_hub_models_in_other_formats_are_named(hub: Hub, files: list[str], message: str) -> None:
    hub.files = files
    with pytest.raises(CheckpointError, match=f"^hub model 'owner/model' {message}"):
        resolve("owner/model")


def test_a_tokenizer_is_downloaded_without_weights(hub: Hub) -> None:
    assert resolve_tokenizer("owner/model", revision="v1") == hub.folder
    assert downloaded(hub) == {"tokenizer.model"}
    assert hub.requests[-1]["revision"] == "v1"
    hub.files = ["tokenizer.json", "additional_chat_templates/rag.jinja", "onnx/rag.jinja"]
    resolve_tokenizer("owner/model")
    assert downloaded(hub) == set(hub.files[:2])
    hub.files = ["config.json", *SHARDS]
    message = "'owner/model' has no tokenizer: expected tekken.json, tokenizer.model or tokenizer.j"
    with pytest.raises(CheckpointError, match=message):
        resolve_tokenizer("owner/model")


def test_options_are_passed_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    options: dict[str, Any] = {"revision": "v0.1", "token": "hf_x"}
    resolve("owner/model", cache_dir=tmp_path, force_download=True, **options)
    listed, fetched = hub.requests
    assert listed == {"repo_id": "owner/model", **options}
    assert fetched.pop("allow_patterns")
    assert fetched == {**listed, "cache_dir": tmp_path, "force_download": True}


def test_local_folders_ignore_the_options_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    options: dict[str, Any] = {"revision": "v0.1", "cache_dir": "/no/such", "token": "x"}
    for each in (options, {"local_files_only": True}, {"force_download": True}):
        assert resolve(tmp_path, **each) == tmp_path
        assert resolve("tiny", **each).name == "tiny"
    assert hub.requests == []


def test_cached_files_are_used_offline(hub: Hub) -> None:
    """Only the files of one format are in the cache, as a download leaves it."""
    hub.online = False
    message = (
        "no such folder: 'owner/model'; the hub model of this name is incomplete in the cache, and "
        "the hub cannot be reached (ConnectionError: Name or service not known); check the "
        "connection, or give the folder of a checkpoint"
    )
    with pytest.raises(CheckpointError) as caught:
        resolve("owner/model")
    assert str(caught.value) == message
    for name in ("config.json", "tokenizer.model", SHARDS[0]):
        (hub.folder / name).touch()
    with pytest.raises(CheckpointError, match="is incomplete in the cache"):
        resolve("owner/model")
    (hub.folder / SHARDS[1]).touch()
    assert resolve("owner/model", cache_dir="x") == hub.folder
    assert hub.requests[-1]["cache_dir"] == "x"
    with pytest.raises(CheckpointError, match="must be downloaded again, and the hub cannot be re"):
        resolve("owner/model", force_download=True)


def test_local_files_only_makes_no_request(hub: Hub) -> None:
    hub.model_info = None  # type: ignore[assignment, method-assign]
    message = "hub model 'owner/model' is incomplete in the cache; leave out local_files_only to d"
    with pytest.raises(CheckpointError, match=message):
        resolve("owner/model", local_files_only=True)
    hub.files = []  # versions that do not check for missing files return the folder
    with pytest.raises(CheckpointError, match=message):
        resolve("owner/model", local_files_only=True)
    (hub.folder / "consolidated.00.pth").touch()
    assert resolve("owner/model", local_files_only=True) == hub.folder


RESOLVE_ALL = """
import json, sys
from mistral_kernels.checkpoint import CheckpointError, resolve

for name, options in json.load(sys.stdin):
    try:
        print(resolve(name, **options).parent.name)
    except CheckpointError as error:
        print(error)
"""


def resolve_all(url: str, home: Path, names: list[Any], **environment: str) -> list[str]:
    """Call `resolve` in a process with the real huggingface_hub; return the results or errors."""
    names = [(each, {}) if isinstance(each, str) else each for each in names]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE_ALL],
        input=json.dumps(names),
        env={**kept, "HF_ENDPOINT": url, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "", "no progress bar in a pipe, and no warning"
    return done.stdout.splitlines()


def test_errors_of_the_hub_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    """A local server gives the answers of the hub to the real library."""
    repositories = {
        "o/good": {"config.json": b"{}", "model.safetensors": b"x", "README.md": b"x"},
        "o/gated": Refusal(403, "GatedRepo"),
        "o/private": Refusal(401),
        "o/forbidden": Refusal(403),
        "o/failing": Refusal(500),
    }
    names = [
        "o/good",
        ["o/good", {"revision": "v9"}],
        *["o/none", "o/gated", "o/private", "o/forbidden", "o/failing", "a--b/c"],
        ["o/none", {"token": True}],
    ]
    messages = [
        "snapshots",
        "hub model 'o/good' has no revision 'v9'; its branches and tags are at "
        "https://huggingface.co/o/good/tree/main",
        "no such folder and no such hub model: 'o/none'; check the name or, if the model is "
        "private, set HF_TOKEN to an access token or run `hf auth login`",
        "hub model 'o/gated' is gated: accept its license at https://huggingface.co/o/gated, then "
        "set HF_TOKEN to an access token of that account or run `hf auth login`",
        "the hub refuses the access token for 'o/private': set HF_TOKEN to a valid token ",
        "the hub refuses the access token for 'o/forbidden': set HF_TOKEN to a valid token ",
        "the hub does not serve 'o/failing': ",
        "no such folder: 'a--b/c', and the request to the hub failed: HFValidationError: ",
        "token=True requires a saved access token; set HF_TOKEN or run `hf auth login`",
    ]
    with serving(repositories) as url:
        results = resolve_all(url, tmp_path, names)
    for result, message in zip(results, messages, strict=True):
        assert result.startswith(message)
    assert resolve_all(url, tmp_path, ["o/good", "o/none"]) == [
        "snapshots",
        "no such folder: 'o/none'; the hub model of this name is not in the cache, and the hub "
        "cannot be reached (ConnectError: [Errno 111] Connection refused); check the connection, "
        "or give the folder of a checkpoint",
    ]
    assert resolve_all(url, tmp_path, ["o/good", "o/none"], HF_HUB_OFFLINE="1") == [
        "snapshots",
        "hub model 'o/none' is not in the cache, and HF_HUB_OFFLINE is set; unset it to download "
        "the model",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("file", "options", "shows"),
    [
        (Terminal(), {}, False),
        (Terminal(), {"delay": 0.001}, True),
        (io.StringIO(), {"delay": 0.001}, False),
    ],
)
def test_progress_appears_on_terminals_after_a_delay(
    file: io.StringIO, options: dict[str, Any], shows: bool
) -> None:
    bars = []

    def fetch(tqdm_class: Any) -> str:
        bars.append(tqdm_class(total=10, file=file, mininterval=0, **options))
        time.sleep(0.002)
        bars[0].set_description("Fetching")
        bars[0].update(10)
        return "folder"

    assert download(fetch) == "folder"
    shown = file.getvalue()
    assert ("Fetching: 100%" in shown) == shows
    assert shows or shown == ""
    bars[0].close()
    assert file.getvalue() == shown, "the bar is closed"


def test_an_interrupt_ends_a_download() -> None:
    ended = []

    def fetch(tqdm_class: Any) -> str:
        bar = tqdm_class(total=10)
        signal.raise_signal(signal.SIGINT)
        for _ in range(100_000):
            time.sleep(0.001)
            try:
                bar.update(0)
            except InterruptedError:
                ended.append(True)
                raise
        return "the whole model"

    with pytest.raises(KeyboardInterrupt):
        download(fetch)
    assert ended == [True]


def test_retries_are_not_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the warnings are hidden during `resolve` only."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    hub.online, listed, loaded = False, hub.model_info, hub.snapshot_download

    def warn(*_: Any) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")

    def model_info(repo_id: str, **options: Any) -> Any:
        warn()
        return listed(repo_id, **options)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        warn()
        return loaded(repo_id, **options)

    hub.model_info = model_info  # type: ignore[method-assign]
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
    with pytest.raises(CheckpointError, match=r'pip install "mistral_kernels\[hf\]"'):
        resolve("owner/model")
