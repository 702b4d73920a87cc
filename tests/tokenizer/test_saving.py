"""Test `save_pretrained`: the folder opens as the same tokenizer, and errors change nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import (
    DATA,
    SENTENCEPIECE,
    TEKKEN,
    TEXTS,
    TOKENIZERS,
    USER,
    make_folder,
    transformers,
    write,
)

from mistral_kernels import AutoTokenizer
from mistral_kernels.tokenizer import TokenizerError

ATTRIBUTES = [
    *("bos_token", "eos_token", "unk_token", "pad_token", "special_tokens_map", "chat_template"),
    *("padding_side", "truncation_side", "model_max_length", "all_special_ids", "chat_version"),
    *("add_bos_token", "add_eos_token"),
]


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_equal(saved: Any, tokenizer: Any) -> None:
    for name in ATTRIBUTES:
        assert getattr(saved, name) == getattr(tokenizer, name), name
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert saved.encode(text) == ids
        assert saved.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_saved_tokenizer_is_the_same(case: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", case)
    tokenizer = AutoTokenizer.from_pretrained(source)
    target = tmp_path / "new" / "target"
    paths = tokenizer.save_pretrained(target)
    assert {Path(path).name for path in paths} == {p.name for p in target.iterdir()}
    before = files_of(source)
    for name, data in files_of(target).items():
        assert data == before[name]
    assert_equal(AutoTokenizer.from_pretrained(target), tokenizer)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_changed_attributes_are_saved_beside_a_model(case: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path / "source", case))
    write(tmp_path / "target", config={"a": 1}, model="weights", tokenizer_config={"b": 1})
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    tokenizer.model_max_length = 77
    if tokenizer.is_fast:
        tokenizer.chat_template = {"default": "a", "tool_use": "b{{ pad_token }}"}
    tokenizer.add_eos_token = True
    tokenizer.add_bos_token = False
    before = files_of(tmp_path / "target")
    tokenizer.save_pretrained(str(tmp_path / "target"), push_to_hub=False)
    saved = AutoTokenizer.from_pretrained(tmp_path / "target")
    after = files_of(tmp_path / "target")
    for name in ("config.json", "model.json"):
        assert after[name] == before[name]
    assert saved.encode("the")[-1] == saved.eos_token_id
    assert_equal(saved, tokenizer)
    assert not [path for path in (tmp_path / "target").iterdir() if path.name.startswith(".")]
    if tokenizer.is_fast:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "target")
        assert theirs.encode("the quick") == saved.encode("the quick")
        assert theirs.pad_token == saved.pad_token
        assert theirs.chat_template == saved.chat_template
    saved.save_pretrained(tmp_path / "target")  # its own folder
    assert files_of(tmp_path / "target") == after


def test_special_tokens_map_is_changed_as_well(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", "byte_level")
    write(folder, special_tokens_map={"pad_token": "<unk>", "eos_token": "</s>"})
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    tokenizer.save_pretrained(tmp_path / "target")
    assert AutoTokenizer.from_pretrained(tmp_path / "target").special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }


@pytest.mark.parametrize("name", [SENTENCEPIECE["v3"], TEKKEN])
def test_a_tokenizer_opened_by_its_file_is_saved_alone(name: str, tmp_path: Path) -> None:
    """The folder of mistral-common holds ten tokenizers."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    tokenizer.save_pretrained(tmp_path)
    assert len(files_of(tmp_path)) == 1
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template([USER]) == tokenizer.apply_chat_template([USER])


def test_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source", "chatml")
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    old = AutoTokenizer.from_pretrained(make_folder(tmp_path / "other", "byte_level"))
    target = tmp_path / "target"
    old.save_pretrained(target)
    (target / "tokenizer.json").chmod(0o600)
    before = files_of(target)
    replace, calls = os.replace, 0

    for failing in range(1, 5):
        calls = 0

        def fail(source: Any, target: Any, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError("disk full")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            for folder in (target, tmp_path / "new"):
                calls = 0 if folder == target else failing - 1
                with pytest.raises(TokenizerError) as caught:
                    tokenizer.save_pretrained(folder)
                assert str(caught.value) == f"{folder}: nothing was saved: disk full"
        assert files_of(target) == before
        assert not (tmp_path / "new").exists()
    tokenizer.save_pretrained(target)
    assert files_of(target) != before


def test_folders_that_cannot_hold_the_tokenizer_are_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path / "source", "byte_level"))
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "tokenizer.json").mkdir(parents=True)
    expected = {
        "file": ": nothing was saved: [Errno 17] File exists: '{}'",
        "taken": ": nothing was saved: {}/tokenizer.json must be a file, got a folder",
    }
    for name in ("tekken.json", "tokenizer.model.v3", "x.model.v7", "added_tokens.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).touch()
        expected[folder.name] = (
            f" must not hold files of another tokenizer, got {name}; name another folder"
        )
    for name, message in expected.items():
        folder = tmp_path / name
        before = files_of(folder)
        with pytest.raises(TokenizerError) as caught:
            tokenizer.save_pretrained(folder)
        assert str(caught.value) == f"{folder}{message.format(folder)}"
        assert files_of(folder) == before
