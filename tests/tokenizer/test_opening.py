"""Test which tokenizer file of a folder is opened, and which files are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import DATA, SENTENCEPIECE, make_tekken, refused, train_json, write

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError


def test_order_of_preference_in_a_folder(tmp_path: Path) -> None:
    """Check the order: tekken.json, tokenizer.model of the highest version, tokenizer.json."""
    train_json(tmp_path / "tokenizer.json", byte_level=False)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())

    def opened() -> str:
        return MistralTokenizer.from_pretrained(str(tmp_path)).path.name

    write(tmp_path, "v1")
    assert opened() == "tokenizer.model"
    assert not MistralTokenizer.from_pretrained(tmp_path).has_chat_template
    # Exception: tokenizer.json has special tokens that the vendor's file lacks (fine-tuned model).
    added = [*saved["added_tokens"], {**saved["added_tokens"][1], "id": 32000, "content": "<|im|>"}]
    write(tmp_path, tokenizer=saved | {"added_tokens": added})
    assert opened() == "tokenizer.json"
    write(tmp_path, tokenizer=saved)
    # Exception: added_tokens.json has such tokens, even if tokenizer.json cannot add them.
    write(tmp_path, added_tokens={"<x>": 32000})
    refused(
        tmp_path, "tokenizer.json: the added token '<x>' must have the id 32000, as in the file"
    )
    (tmp_path / "added_tokens.json").unlink()
    # Exception: the chat template is not Mistral's.
    write(tmp_path, tokenizer_config={"chat_template": "<|user|>{{ messages }}"})
    assert opened() == "tokenizer.json"
    write(tmp_path, tokenizer_config={"chat_template": "[INST]{{ messages }}[/INST]"})
    assert opened() == "tokenizer.model"
    assert MistralTokenizer.from_pretrained(tmp_path).has_chat_template

    for version in ("v3", "v2"):
        shutil.copy(DATA / SENTENCEPIECE[version], tmp_path / f"tokenizer.model.{version}")
    (tmp_path / "old.model").mkdir()
    assert opened() == "tokenizer.model.v3"
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, tekken=make_tekken())
    assert opened() == "tekken.json"


@pytest.mark.parametrize("content", [b"", b"not a model", b"{}", b"[1]", b'{"config": {}}'])
@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "tokenizer.json"]
)
def test_corrupt_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    what = {"tekken.json": "tekken file", "tokenizer.json": "tokenizer.json"}
    message = f": not a {what.get(name, 'sentencepiece model')}: "
    if name.endswith(".json") and not content.startswith(b"{"):
        message = " must be "
    for path in (tmp_path, tmp_path / name):
        refused(path, f"{name}{message}")


def test_sentencepiece_model_with_invalid_utf8_is_refused(tmp_path: Path) -> None:
    """The library opens such a model, but every use of the invalid piece would fail."""
    contents = (DATA / SENTENCEPIECE["v1"]).read_bytes()
    assert contents.count(b"\x0a\x07\xe2\x96\x81quit") == 1
    broken = contents.replace(b"\x0a\x07\xe2\x96\x81quit", b"\x0a\x07\xe2\x96\xffquit")
    (tmp_path / "tokenizer.model").write_bytes(broken)
    refused(tmp_path, "tokenizer.model: not a sentencepiece model: 'utf-8' codec can't decode")


def test_paths_without_tokenizer_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no tokenizer found; looked for tekken.json, tokenizer.model, tokenizer.mo")
    with pytest.raises(TokenizerError, match=r"no such folder: .*/absent"):
        MistralTokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "vocab.txt").touch()
    refused(tmp_path / "vocab.txt", "vocab.txt: not a tokenizer's file name; expected tekken.json")
    for name in ("tokenizer.model", "tekken.json", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        refused(
            tmp_path, f"{name} is a Git LFS pointer, not the file; run `git lfs pull` in its folder"
        )
        (tmp_path / name).unlink()


def test_hub_ids_are_resolved(monkeypatch: Any) -> None:
    from mistral_kernels.tokenizer import opening

    calls = []

    def resolve(name: str, **options: Any) -> Path:
        calls.append((name, options))
        return DATA / SENTENCEPIECE["v3"]

    monkeypatch.setattr(opening, "resolve_tokenizer", resolve)
    options = {
        "revision": "refs/pr/1",
        "cache_dir": "cache",
        "token": False,
        "local_files_only": True,
        "force_download": True,
    }
    tokenizer = MistralTokenizer.from_pretrained("owner/model", **options)
    assert tokenizer.chat_version == "v3"
    assert tokenizer.name_or_path == "owner/model"
    assert calls == [("owner/model", options)]


MAIN = ["tokenizer.model", "tekken.json", "tokenizer.json"]
BESIDE = [
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/x.jinja"),
]


@pytest.mark.parametrize("name", [*MAIN, *BESIDE])
def test_only_regular_files_of_limited_size_are_read(tmp_path: Path, name: str) -> None:
    """Check that a FIFO, a device, a huge file, a broken link and a folder are refused."""
    if name in BESIDE:
        write(tmp_path, "v1")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    refused(tmp_path, f"{name} must be a regular file, got a FIFO")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(tmp_path, f"{name} must be a regular file, got a device")
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    refused(tmp_path, f"{name} must have at most ")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")  # left by an interrupted download
    with pytest.raises(TokenizerError, match=f"{path} .* broken symbolic link"):
        MistralTokenizer.from_pretrained(tmp_path)
    path.unlink()
    if path.suffix == ".json":  # a folder named tokenizer.model is ignored
        path.mkdir()
        refused(tmp_path, f"{name} must be a regular file, got a folder")


@pytest.mark.parametrize("vocabulary", ["v1", None])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", " must be a JSON object, got list"),
        ("{", " must be JSON: Expecting property name"),
        ("[" * 200_000, " must be JSON of moderate depth"),
        ({"bos_token": 1}, ": bos_token must be a string or null or an object, got 1"),
        ({"eos_token": ["</s>"]}, ": eos_token must be a string or null or an object, got ["),
        ({"pad_token": {"content": 1}}, ": pad_token.content must be a string, got 1"),
        ({"cls_token": {}}, ": content of an added token must not be empty, got None"),
        ({"sep_token": {"content": "s", "lstrip": 1}}, ": sep_token.lstrip must be true or false"),
        ({"eos_token": "\ud800"}, ": content of an added token must be valid Unicode, got"),
        ({"image_token": "\ud800"}, ": content of an added token must be valid Unicode, got"),
        ({"add_bos_token": 1}, ": add_bos_token must be true or false or null, got 1"),
        ({"add_eos_token": "true"}, ": add_eos_token must be true or false or null, got 'true'"),
        ({"legacy": "no"}, ": legacy must be true or false or null, got 'no'"),
        ({"additional_special_tokens": "x"}, ": additional_special_tokens must be a list or null"),
        ({"additional_special_tokens": [1]}, ": additional_special_tokens[0] must be a string or"),
        ({"extra_special_tokens": {"x": 1}}, ": extra_special_tokens.x must be a string or null"),
        ({"extra_special_tokens": 7}, ": extra_special_tokens must be a list or null or an object"),
        ({"chat_template": 7}, ": chat_template must be a string or null or a list or an object"),
        ({"chat_template": ["x"]}, ": chat_template[0] must be an object, got 'x'"),
        ({"chat_template": [{"name": "x"}]}, ": each entry of chat_template must have a"),
        ({"chat_template": [{"name": 1, "template": ""}]}, ": chat_template[0].name must be a st"),
        (
            {"chat_template": {"default": None}},
            ": chat_template.default must be a string, got None",
        ),
    ],
)
def test_config_values_of_wrong_type_are_refused(
    tmp_path: Path, vocabulary: str | None, config: Any, message: str
) -> None:
    if vocabulary is None:
        train_json(tmp_path / "tokenizer.json", byte_level=True)
    write(tmp_path, vocabulary, tokenizer_config=config)
    refused(tmp_path, f"tokenizer_config.json{message}")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (7, "added_tokens must be a list or null, got 7"),
        ([7], "added_tokens[0] must be an object, got 7"),
        ([{"id": "x"}], "added_tokens[0].id must be an integer, got 'x'"),
        ([{"content": None}], "added_tokens[0].content must be a string, got None"),
    ],
)
def test_added_tokens_of_wrong_type_are_refused(tmp_path: Path, added: Any, message: str) -> None:
    write(tmp_path, tokenizer={"added_tokens": added})
    refused(tmp_path, f"tokenizer.json: {message}")
    write(tmp_path, "v1")
    refused(tmp_path, f"tokenizer.json: {message}")


def test_files_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "v1")
    for name in BESIDE[:4]:
        (tmp_path / name).write_bytes(b"\xff\xfe{}")
        refused(tmp_path, f"{name} must be UTF-8: ")
        (tmp_path / name).unlink()
