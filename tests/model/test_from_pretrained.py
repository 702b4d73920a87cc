"""The arguments of transformers' `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL, varied_model
from tqdm import tqdm

from mistral_kernels import AutoModelForCausalLM, MistralForCausalLM, checkpoint
from mistral_kernels.model import transformer
from mistral_kernels.model.pretrained_arguments import LOADING, SAVING, parse_device
from mistral_kernels.utils.unsupported import TRANSFORMERS

DTYPES = "bfloat16, float16, float32 or float64 as a torch.dtype or a name"
SEVERAL = (
    "to divide a model among devices, run torchrun -m mistral_kernels.generate, which uses tensor "
    "parallelism"
)
QUANTIZED = f'pass quantize="int8" for int8 weights on the CPU, or {TRANSFORMERS}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint in float32."""
    varied_model(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_no_progress_bar_is_written_to_a_pipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def at_once(**options: Any) -> Any:
        return tqdm(**{**options, "delay": 0})

    monkeypatch.setattr(transformer, "tqdm", at_once)
    MistralForCausalLM.from_pretrained(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("half", torch.float16),
        ("float32", torch.float32),
        ("double", torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.half, torch.float16),
    ],
)
def test_weights_have_the_given_dtype(
    folder: Path, name: str, value: Any, expected: torch.dtype
) -> None:
    """None and "auto" are the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{name: value})
    assert type(model) is MistralForCausalLM
    assert {weight.dtype for weight in model.parameters()} == {expected}
    both = MistralForCausalLM.from_pretrained(folder, dtype=value, torch_dtype=value)
    assert both.dtype == expected


@pytest.mark.parametrize("name", ["device", "device_map"])
@pytest.mark.parametrize("value", [None, "cpu", torch.device("cpu"), "meta", torch.device("meta")])
def test_weights_are_on_the_given_device(folder: Path, name: str, value: Any) -> None:
    """The default is the CPU."""
    expected = torch.device(value or "cpu")
    assert MistralForCausalLM.from_pretrained(folder, **{name: value}).device == expected
    if name == "device_map" and value is not None:
        model = MistralForCausalLM.from_pretrained(folder, device_map={"": value}, device=value)
        assert model.device == expected


def test_device_map_auto_is_the_gpu_if_there_is_one(monkeypatch: Any) -> None:
    model = MistralForCausalLM.from_pretrained("tiny", device_map="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for value, expected in (("auto", "cuda"), (1, "cuda:1"), ({"": 0}, "cuda:0")):
        assert parse_device(None, value) == torch.device(expected)


def test_the_hub_arguments_reach_the_download(monkeypatch: Any) -> None:
    tiny = checkpoint.resolve("tiny")
    given = []

    def resolve(path: str, **options: Any) -> Path:
        given.append((path, options))
        return tiny

    monkeypatch.setattr(checkpoint, "resolve", resolve)
    options = {
        "revision": "v1",
        "cache_dir": "models",
        "token": "secret",
        "local_files_only": True,
        "force_download": True,
    }
    MistralForCausalLM.from_pretrained("owner/model", **options)
    MistralForCausalLM.from_pretrained("owner/model")
    defaults = dict.fromkeys(("revision", "cache_dir", "token"))
    flags = {"local_files_only": False, "force_download": False}
    assert given == [("owner/model", options), ("owner/model", defaults | flags)]


def test_arguments_without_effect_are_accepted(folder: Path) -> None:
    expected = MistralForCausalLM.from_pretrained(folder, sliding_window=None).state_dict()
    most = max(len(known.without_effect) for known in LOADING.values())
    for i in range(most):
        options = {
            name: known.without_effect[i % len(known.without_effect)]
            for name, known in LOADING.items()
        }
        model = MistralForCausalLM.from_pretrained(folder, **options, sliding_window=None)
        assert model.config.sliding_window is None
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected[name])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "x"}, ValueError, f"dtype must be 'auto', None, or {DTYPES}, got 'x'"),
        (
            {"torch_dtype": torch.int8},
            ValueError,
            f"torch_dtype must be 'auto', None, or {DTYPES}, got torch.int8",
        ),
        ({"dtype": 1}, TypeError, f"dtype must be 'auto', None, or {DTYPES}, got 1"),
        (
            {"dtype": torch.float16, "torch_dtype": "auto"},
            ValueError,
            "torch_dtype must equal dtype, torch.float16, got 'auto'; give one of them",
        ),
        (
            {"device": "cpu", "device_map": "meta"},
            ValueError,
            "device_map must equal device, 'cpu', got 'meta'; give one of them",
        ),
        (
            {"device_map": "gpu"},
            ValueError,
            "device_map must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'",
        ),
        ({"device": "auto"}, ValueError, "device must be 'cpu', 'cuda' or 'cuda:N', got 'auto'"),
        (
            {"device_map": -1},
            ValueError,
            "device_map must be 'auto', 'cpu', 'cuda' or 'cuda:N', got -1",
        ),
        (
            {"device": True},
            TypeError,
            "device must be a torch.device, a string or an integer, got bool",
        ),
        (
            {"device_map": "balanced"},
            NotImplementedError,
            f"device_map must be 'auto', one device or {{'': device}}, got 'balanced'; {SEVERAL}",
        ),
        (
            {"device_map": {"model": 0, "lm_head": 1}},
            NotImplementedError,
            "device_map must be 'auto', one device or {'': device}, got {'model': 0, "
            f"'lm_head': 1}}; {SEVERAL}",
        ),
        (
            {"attn_implementation": "flash"},
            NotImplementedError,
            "attn_implementation must be None or 'mistral_kernels' or 'eager' or 'sdpa' or "
            "'flash_attention_2' or 'flash_attention_3' or 'flash_attention_4' or "
            "'flex_attention', got 'flash'; leave it out: the kernels of mistral_kernels are "
            "always used",
        ),
        (
            {"load_in_4bit": True},
            NotImplementedError,
            f"load_in_4bit must be None or False, got True; {QUANTIZED}",
        ),
        (
            {"quantization_config": {"bits": 4}},
            NotImplementedError,
            f"quantization_config must be None, got {{'bits': 4}}; {QUANTIZED}",
        ),
        (
            {"max_memory": {0: "9GB"}},
            NotImplementedError,
            "max_memory must be None, got {0: '9GB'}; leave it out: the whole model is on one "
            f"device; {SEVERAL}",
        ),
        ({"tp_plan": "auto"}, NotImplementedError, f"tp_plan must be None, got 'auto'; {SEVERAL}"),
        (
            {"pad_token_id": 2},
            NotImplementedError,
            "pad_token_id must be None, got 2; pass it to generate",
        ),
        (
            {"key_mapping": {"a": "b"}},
            NotImplementedError,
            f"key_mapping must be None, got {{'a': 'b'}}; {TRANSFORMERS}",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_raise_one_line(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        MistralForCausalLM.from_pretrained("tiny", **options)
    assert str(error.value) == message


@pytest.mark.parametrize("value", ["cuda:7", 7, torch.device("cuda", 7)])
def test_an_absent_gpu_is_named(monkeypatch: Any, value: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = (
        f"device_map must be the CPU or one of the 2 GPUs that PyTorch finds, got {value!r}; use "
        "'cpu', or install a PyTorch built for your GPU"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MistralForCausalLM.from_pretrained("tiny", device_map=value)


@pytest.mark.parametrize(
    ("size", "files"), [(10_000, 9), ("10kb", 9), ("10 KiB", 9), ("5GB", 1), (None, 1)]
)
def test_save_pretrained_takes_the_arguments_of_transformers(
    tmp_path: Path, size: Any, files: int
) -> None:
    """Files have at most `max_shard_size` bytes, except those of a single larger tensor."""
    model = varied_model(SMALL)
    options = {name: known.without_effect[-1] for name, known in SAVING.items()}
    model.save_pretrained(
        tmp_path / "out", max_shard_size=size, save_function=torch.save, **options
    )
    written = list((tmp_path / "out").glob("model*.safetensors"))
    assert (len(written) == 1) == (files == 1)
    loaded = MistralForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight)


def test_save_pretrained_writes_on_the_main_process_only(tmp_path: Path) -> None:
    varied_model(SMALL).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"safe_serialization": False},
            NotImplementedError,
            "safe_serialization must be None or True, got False; leave it out, or write "
            "model.state_dict() with torch.save",
        ),
        (
            {"push_to_hub": True},
            NotImplementedError,
            "push_to_hub must be None or False, got True; upload the folder with "
            "huggingface_hub.upload_folder",
        ),
        ({"name": 1}, TypeError, "save_pretrained() got an unexpected argument 'name'"),
        *(
            (
                {"max_shard_size": size},
                ValueError,
                f"max_shard_size must be a number of bytes or a string such as '5GB', got {size!r}",
            )
            for size in (0, -1, "0GB", "5", "five GB", True, 1.5)
        ),
        (
            {"max_shard_size": "1GB", "format": "raw"},
            ValueError,
            "max_shard_size must be None with format='raw', got '1GB'",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_save_pretrained_raise_one_line(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        varied_model(SMALL).save_pretrained(tmp_path / "out", **options)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()
