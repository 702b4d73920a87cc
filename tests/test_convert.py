"""Test the convert command: both directions, messages and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, random_state

from mistral_kernels import convert
from mistral_kernels.checkpoint import open_checkpoint, save_hf, save_raw, writing

TOKENIZER = (
    *("tokenizer.model.v3", "tekken.json", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"),
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write a raw checkpoint to a folder that also holds a tokenizer and another file."""
    folder = tmp_path / "in" / "raw"
    save_raw(random_state(SMALL).items(), SMALL, folder, dtype=torch.bfloat16)
    (folder / "additional_chat_templates").mkdir()
    for name in TOKENIZER:
        (folder / name).write_text(name)
    (folder / "README.md").write_text("not copied")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_conversion_to_hf_and_back_is_exact(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert convert.main([str(raw), str(hf)]) == 0
    expected = {"model.safetensors", "config.json", "generation_config.json", *TOKENIZER}
    assert files(hf) == expected
    assert (hf / "tekken.json").read_text() == "tekken.json"
    captured = capsys.readouterr()
    assert captured.out == ""
    size = sum(tensor.numel() for tensor in random_state(SMALL).values())
    assert f"raw -> hf: {size:,} parameters, bfloat16: {hf}\n" in captured.err
    assert convert.main([str(hf), str(back)]) == 0
    assert files(back) == files(raw) - {"README.md"}
    for name in files(back):
        assert (back / name).read_bytes() == (raw / name).read_bytes(), name


def test_options_of_the_transformers_script(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "hf"
    arguments = ["--input_dir", str(raw), "--model_size", "7B", "--output_dir", str(target)]
    assert convert.main([*arguments, "--max_position_embeddings", "99"]) == 0
    assert "--model_size 7B ignored" in capsys.readouterr().err
    assert open_checkpoint(target).config.max_position_embeddings == 99


def test_conversion_to_same_format_in_shards_of_other_dtype(raw: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert convert.main([str(raw), str(first)]) == 0
    options = ["--to", "hf", "--dtype", "fp32", "--max-shard-size", "50KB"]
    assert convert.main([str(first), str(second), *options]) == 0
    assert (second / "model.safetensors.index.json").exists()
    before = load_file(first / "model.safetensors")
    for name, tensor in open_checkpoint(second).tensors():
        assert torch.equal(tensor, before[name].float())
    assert json.loads((second / "config.json").read_text())["dtype"] == "float32"


def test_inferred_values_are_reported(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = json.loads((raw / "params.json").read_text())
    del params["rope_theta"]
    (raw / "params.json").write_text(json.dumps(params))
    assert convert.main([str(raw), str(tmp_path / "hf")]) == 0
    assert "rope_theta = 10000.0: not in params.json; " in capsys.readouterr().err


def test_values_that_raw_cannot_store_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    config = dataclasses.replace(SMALL, eos_token_id=(2, 9))
    save_hf(random_state(config).items(), config, tmp_path / "hf", dtype=torch.float32)
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "raw")]) == 0
    error = capsys.readouterr().err
    assert "eos_token_id = (2, 9) is not written: params.json has no such field" in error
    assert "no tokenizer in" in error


def check_failure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], target: Path
) -> None:
    """Check that the command ends with code 2, one error line with `message`, and no new files."""
    before = names(target.parent)
    assert convert.main([*arguments, str(target)]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert message in errors[0], captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert names(target.parent) == before


def test_bad_checkpoints_are_refused(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    check_failure([str(tmp_path / "none")], "no such folder", capsys, target)
    check_failure([str(tmp_path)], "has no configuration", capsys, target)
    weights = raw / "consolidated.safetensors"
    stored, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-1])
    check_failure([str(raw)], "not a valid safetensors file", capsys, target)
    save_file(stored | {"output.weight": torch.zeros(3, 40)}, weights)
    check_failure(
        [str(raw)], "tensor 'output.weight' must have shape (61, 40), got (3, 40)", capsys, target
    )
    weights.unlink()
    check_failure([str(raw)], "no weights", capsys, target)
    weights.write_bytes(whole)
    (raw / "params.json").write_text('{"moe": {"num_experts": 8}}')
    check_failure([str(raw)], "a mixture of experts", capsys, target)


def test_target_that_is_not_empty_is_refused(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "note").touch()
    check_failure([str(raw)], "out is not empty", capsys, target)
    assert names(target) == {"note"}


def test_the_target_is_checked_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "resolve", None)
    (tmp_path / "out").touch()
    check_failure(["owner/model"], "out is a file; name a new folder", capsys, tmp_path / "out")
    long = tmp_path / ("é" * 120)  # its temporary name has more than 255 bytes
    check_failure(["owner/model"], "é is too long; name another folder", capsys, long)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_terminals_only(
    is_terminal: bool,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bar(convert.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any) -> None:
            assert options.pop("delay") == 2
            super().__init__(**options)

    monkeypatch.setattr(convert, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert convert.main([str(raw), str(tmp_path / "hf")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert ("\rconvert: 100%" in err) == is_terminal


def test_interrupt_exits_with_130_and_leaves_no_files(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.SafetensorsWriter, "finish", interrupted)
    assert convert.main([str(raw), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert names(tmp_path) == {"in"}


def test_remains_of_a_killed_run_are_removed(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".other.partial-0123456789abcdef"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(100))
    assert convert.main([str(raw), str(tmp_path / "out")]) == 0
    assert names(tmp_path) == {"in", "out"}
    assert f"removed {left}, which an interrupted run had left" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE, the checkpoint to read, and TARGET, the folder to write, are required"),
        (["only-one"], "TARGET, the folder to write, are required"),
        (["a", "b", "--input_dir", "c"], "SOURCE and TARGET must be given once"),
        (["a", "b", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["a", "b", "--max-shard-size", "0"], "must be a size such as 5GB"),
        (["a", "b", "--max-shard-size", "many"], "must be a size such as 5GB"),
        (["a", "b", "--max_position_embeddings", "-1"], "must be in [1, 1000000000], got -1"),
    ],
)
def test_bad_arguments_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        convert.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
