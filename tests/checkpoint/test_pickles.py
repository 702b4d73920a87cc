"""Test files of `torch.save` and malicious or damaged variants of them."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_checkpoints import SMALL, State, random_state

from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, save_hf

NAME = "model.norm.weight"


class Folder:
    """Checkpoint in HF format whose weights are one pickle."""

    def __init__(self, path: Path) -> None:
        self.state = random_state(SMALL)
        save_hf(self.state.items(), SMALL, path, dtype=torch.float32)
        (path / "model.safetensors").unlink()
        self.path, self.file = path, path / "pytorch_model.bin"

    def save(self, contents: object, **options: object) -> None:
        torch.save(contents, self.file, **options)

    def edit(
        self,
        change: Callable[[str, bytes], bytes | None],
        compression: int = zipfile.ZIP_STORED,
    ) -> None:
        """Rewrite the archive; `change(name, contents)` returns the new contents of a record."""
        out = io.BytesIO()
        with zipfile.ZipFile(self.file) as old, zipfile.ZipFile(out, "w", compression) as new:
            for info in old.infolist():
                contents = change(info.filename.partition("/")[2], old.read(info))
                if contents is not None:
                    new.writestr(info.filename, contents)
        self.file.write_bytes(out.getvalue())

    def put(self, data: bytes) -> None:
        """Replace the pickle in the file."""
        self.save(self.state)
        self.edit(lambda name, old: data if name == "data.pkl" else old)

    def check(self, expected: State) -> None:
        """Check that exactly the tensors `expected` are read."""
        found = {name: tensor.clone() for name, tensor in open_checkpoint(self.path).tensors()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name

    def check_refused(self, message: str) -> None:
        """Check that opening fails with an error of one line that begins with `message`."""
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(self.path)
        text = str(caught.value)
        assert text.startswith(f"{self.file} {message}"), text
        assert "\n" not in text, text


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "hf")


def ordered(state: State) -> State:
    out = collections.OrderedDict(state)
    out._metadata = collections.OrderedDict(a={"version": 1})  # type: ignore[attr-defined]
    return out


def side_by_side(state: State) -> State:
    """Return views of one storage, sorted by name, with the values of all tensors."""
    names = sorted(state)
    storage = torch.cat([state[name].flatten() for name in names])
    parts = storage.split([state[name].numel() for name in names])
    return {name: part.view(state[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize(
    "change",
    [
        ordered,
        side_by_side,
        lambda state: {name: torch.nn.Parameter(x) for name, x in state.items()},
        lambda state: {name: x.bfloat16() for name, x in state.items()},
        lambda state: {name: x.double() for name, x in state.items()},
        lambda state: {name: x.t().contiguous().t() for name, x in state.items()},
        lambda state: {name: torch.stack([x, x], -1)[..., 1] for name, x in state.items()},
        lambda state: state | {NAME: torch.ones(1).expand(SMALL.hidden_size)},
        lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    ],
    ids=[
        "ordered",
        "shared",
        "parameters",
        "bf16",
        "f64",
        "transposed",
        "strided",
        "expanded",
        "derived",
    ],
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_saved_values_are_read_back(
    folder: Folder, change: Callable[[State], State], protocol: int
) -> None:
    state = change(folder.state)
    folder.save(state, pickle_protocol=protocol)
    expected = {name: x.detach() for name, x in state.items() if name in folder.state}
    folder.check(expected)
    folder.edit(lambda name, old: old)  # the records are no longer aligned
    folder.check(expected)


def test_compressed_records_are_refused(folder: Folder) -> None:
    folder.save(folder.state)
    folder.edit(lambda name, old: old, zipfile.ZIP_DEFLATED)
    folder.check_refused(
        "was refused: its record 'data.pkl' is compressed; save it again with torch.save"
    )


@pytest.mark.parametrize("size", [0, 8, -4, 4000])
def test_records_of_wrong_length_are_refused(folder: Folder, size: int) -> None:
    """`torch.load` would read as many bytes as the pickle claims, even past the end of the file."""
    folder.save(folder.state)
    last = f"data/{len(folder.state) - 1}"
    longer = bytes(4000)
    folder.edit(
        lambda name, old: (old + longer if size > 4 else old)[:size] if name == last else old
    )
    folder.check_refused(
        "is incomplete or damaged (ValueError: the storage of tensor 'lm_head.weight' has 9760 "
        "bytes, but its record has "
    )


def test_big_endian_is_refused(folder: Folder) -> None:
    folder.save(folder.state)
    folder.edit(lambda name, old: b"big" if name == "byteorder" else old)
    folder.check_refused(
        "was refused: its byte order is not little-endian; save it again on this machine"
    )
    folder.save(folder.state)
    folder.edit(lambda name, old: None if name == "byteorder" else old)  # PyTorch before 2.1
    folder.check(folder.state)


def test_damaged_archives_are_refused(folder: Folder) -> None:
    folder.save(folder.state)
    whole = folder.file.read_bytes()
    folder.file.write_bytes(b"")
    folder.check_refused(
        "is not in the format that torch.save writes since PyTorch 1.6; save it again"
    )
    for length in (4, 1000, len(whole) // 2, len(whole) - 1):
        folder.file.write_bytes(whole[:length])
        folder.check_refused("is incomplete or damaged (BadZipFile: ")
    for missing in ("data.pkl", "data/3"):
        folder.file.write_bytes(whole)
        folder.edit(lambda name, old: None if name == missing else old)  # noqa: B023
        folder.check_refused(
            f"is incomplete or damaged (KeyError: '{missing}'); download or copy it again"
        )
    folder.file.write_bytes(whole)
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(folder.file, "a") as file,
    ):
        file.writestr(file.namelist()[0].partition("/")[0] + "/data/3", b"")
    folder.check_refused("is incomplete or damaged (ValueError: unexpected record")


def test_huge_zip_directory_is_refused(folder: Folder, tmp_path: Path) -> None:
    """Use a sparse file of 3 GiB, which zipfile alone would read in one call."""
    size = 3 << 30
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 8, 0)
    with folder.file.open("wb") as file:
        file.write(b"PK\3\4PK\1\2")
        file.seek(8 + size)
        file.write(end)
    folder.check_refused(
        "is incomplete or damaged (ValueError: the zip directory must have at most 8388608 bytes); "
        "download"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(40).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(40, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (torch._neg_view(torch.ones(40)), "a negated or conjugated tensor"),
        (torch.ones(40, dtype=torch.complex64).conj().imag, "a negated or conjugated tensor"),
        (torch.ones(40, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(40).to(torch.float8_e5m2), "torch._utils._rebuild_tensor_v3"),
        (torch.Size([40]), "torch.Size"),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "torch.device"),
    ],
    ids=str,
)
def test_other_values_of_torch_are_refused(folder: Folder, value: object, message: str) -> None:
    folder.save(folder.state | {NAME: value})
    folder.check_refused(f"was refused: it holds more than plain tensors ({message})")


@pytest.mark.filterwarnings("ignore")
def test_nested_and_quantized_tensors_are_refused(folder: Folder) -> None:
    for value, name in (
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "_rebuild_nested_tensor"),
        (torch.quantize_per_tensor(torch.ones(40), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    ):
        folder.save(folder.state | {NAME: value})
        folder.check_refused(f"was refused: it holds more than plain tensors (torch._utils.{name})")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "must hold a dict of tensors, got an empty dict"),
        ([torch.ones(1)], "must hold a dict of tensors, got list"),
        (None, "must hold a dict of tensors, got NoneType"),
        (torch.ones(1), "must hold a dict of tensors, got Tensor"),
        ({"a": None}, "must map names to tensors, but the entry 'a' has type NoneType"),
        ({"model": {"a": torch.ones(1)}}, "must map names to tensors, but the entry 'model' has"),
        ({"epoch": 3}, "must map names to tensors, but the entry 'epoch' has type int"),
        ({3: torch.ones(1)}, "must map names to tensors, but the entry 3 has type int"),
        (
            {(1, 2): torch.ones(1)},
            "is incomplete or damaged (TypeError: a key must be a str or an int,",
        ),
        ({"a\nb": 3}, "must map names to tensors, but the entry 'a\\nb' has type int"),
    ],
)
def test_other_contents_are_refused(folder: Folder, contents: object, message: str) -> None:
    folder.save(contents)
    folder.check_refused(message)


def test_integer_tensors_are_refused(folder: Folder) -> None:
    folder.save(folder.state | {NAME: torch.ones(40, dtype=torch.int64)})
    message = f"tensor '{NAME}' must be stored as BF16, F16, F32, F64, got I64"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder.path)
    folder.save(folder.state | {NAME: torch.ones(40, dtype=torch.int8)})
    message = rf"has quantized weights \(tensor '{NAME}' is stored as I8\)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder.path)
    folder.save(folder.state | {"position_ids": torch.ones(1, 40, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="unexpected tensor 'position_ids'"):
        open_checkpoint(folder.path)


def tensor_of(offset: object, shape: object, strides: object, numel: object = 40) -> bytes:
    """Return a pickle of one tensor in the record data/0, with any offset, shape and strides."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: object) -> object:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    class Tensor:
        def __reduce__(self) -> tuple:
            hooks: dict = collections.OrderedDict()
            arguments = (Storage(), offset, shape, strides, False, hooks)
            return torch._utils._rebuild_tensor_v2, arguments

    out = io.BytesIO()
    Pickler(out, 2).dump({NAME: Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, (40,), (1,)), f"tensor '{NAME}' exceeds its storage"),
        ((0, (41,), (1,)), f"tensor '{NAME}' exceeds its storage"),
        ((0, (40,), (2,)), f"tensor '{NAME}' exceeds its storage"),
        ((0, (2, 2), (39, 1)), f"tensor '{NAME}' exceeds its storage"),
        ((2**62, (40,), (1,)), f"tensor '{NAME}' exceeds its storage"),
        ((0, (2**62,), (2**62,)), f"tensor '{NAME}' exceeds its storage"),
        ((0, (40,), (1,), 2**62), f"tensor '{NAME}' has 18446744073709551616 bytes, but its"),
        ((-1, (40,), (1,)), "a size must be an integer in [0, 2**63), got -1"),
        ((0, (-40,), (1,)), "a size must be an integer in [0, 2**63), got -40"),
        ((39, (40,), (-1,)), "a size must be an integer in [0, 2**63), got -1"),
        ((0, (2**63,), (0,)), "a size must be an integer in [0, 2**63), got 9223372036854775808"),
        ((0, (True,), (1,)), "a size must be an integer in [0, 2**63), got a bool"),
        ((0, (40.0,), (1,)), "a size must be an integer in [0, 2**63), got a float"),
        ((0, (40,), ()), "a tensor must be described by storage, offset, shape and strides"),
        ((0, (1,) * 65, (1,) * 65), "a tensor must be described by storage, offset, shape and"),
        ((0, 40, 1), "object of type 'int' has no len()"),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    folder: Folder, arguments: tuple, reason: str
) -> None:
    folder.state = {NAME: torch.ones(40)}
    folder.put(tensor_of(0, (40,), (1,)))
    with pytest.raises(CheckpointError, match=r"no tensor 'model.embed_tokens.weight'"):
        open_checkpoint(folder.path)
    folder.put(tensor_of(*arguments))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder.path)
    assert reason in str(caught.value)


class Call:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


# Pickles that call a function in every way that the format offers. Given the path of a folder, most
# of them would make the folder.
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "reduce": lambda path: pickle.dumps({NAME: Call(os.mkdir, path)}, 2),
    "reduce, protocol 0": lambda path: pickle.dumps({NAME: Call(os.mkdir, path)}, 0),
    "reduce, protocol 4": lambda path: pickle.dumps({NAME: Call(os.mkdir, path)}, 4),
    "eval": lambda path: pickle.dumps(Call(eval, f"__import__('os').mkdir({path!r})"), 2),
    "import": lambda path: pickle.dumps(Call(__import__, "os"), 2),
    "getattr": lambda path: pickle.dumps(Call(getattr, "x", "upper"), 2),
    "inst": lambda path: b"(S'%b'\nios\nmkdir\n." % path.encode(),
    "obj": lambda path: b"(cos\nmkdir\nS'%b'\no." % path.encode(),
    "newobj": lambda path: b"\x80\x02cos\nmkdir\nS'%b'\n\x85\x81." % path.encode(),
    "build": lambda path: b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
    "extension": lambda path: b"\x80\x02\x82\x01.",
    "a call of a class": lambda path: b"\x80\x02ctorch\nFloatStorage\n(K\x05tR.",
    "a call of a string": lambda path: b"\x80\x02X\x05\x00\x00\x00mkdir)R.",
    "a name of names": lambda path: b"\x80\x04\x8c\x05torch\x8c\x0d_utils.mkdirs\x93)R.",
    "a name of no strings": lambda path: b"\x80\x04))\x93)R.",
    "a text persistent id": lambda path: b"Pstorage\n.",
    "a persistent id of another kind": lambda path: b"\x80\x02X\x01\x00\x00\x00aQ.",
    "a parameter of no tensor": lambda path: (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01tR."
    ),
    "an ordered dict of items": lambda path: b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_pickles_call_no_function(folder: Folder, tmp_path: Path, how: str) -> None:
    folder.put(HOSTILE[how](str(tmp_path / "made")))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder.path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    if how in ("reduce", "reduce, protocol 4"):
        message = (
            "was refused: it would call posix.mkdir when loaded; only plain tensors are supported"
        )
        assert message in str(caught.value)


TUPLES = b"\x85" * 100_000  # nested tuples of one item


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ValueError: pickle exhausted before seeing STOP"),
        (b"\x80\x02", "ValueError: pickle exhausted before seeing STOP"),
        (b"\x80\x02.", "IndexError: pop from empty list"),
        (b"\x80\x02a.", "IndexError: list index out of range"),
        (b"\x80\x02\x87.", "IndexError: pop from empty list"),
        (b"\x80\x02t.", "IndexError: pop from empty list"),
        (b"\x80\x02h\x05.", "KeyError: 5"),
        (b"\x80\x02X\xff\xff\xff\x7f", "ValueError: expected 2147483647 bytes in a unicodestring4"),
        (b"\x80\x02\xff", "ValueError: at position 2, opcode b'\\xff' unknown"),
        (b"\x80\x02]K\x01K\x02s.", "TypeError: expected a dict, got a list"),
        (b"\x80\x02}K\x01a.", "TypeError: expected a list, got a dict"),
        (b"\x80\x02}(K\x01u.", "ValueError: zip() argument 2 is shorter than argument 1"),
        (b"\x80\x02})" + TUPLES + b"K\x01s.", "TypeError: a key must be a str or an int, got a"),
        (b"\x80\x02" + b"0" * (1 << 20), "ValueError: a record has 1048578 bytes, at most 1048576"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_malformed_pickles_are_refused(folder: Folder, data: bytes, reason: str) -> None:
    folder.put(data)
    folder.check_refused(f"is incomplete or damaged ({reason}")


def test_large_memos_and_nested_tuples_take_little_memory(folder: Folder) -> None:
    """Check a memo index of 2**32 - 1, for which pickle would allocate 32 GB, and a deep tuple."""
    folder.put(b"\x80\x02)r\xff\xff\xff\xff" + TUPLES + b".")
    folder.check_refused("must hold a dict of tensors, got tuple")
    folder.put(b"\x80\x02)" + b"2\x86" * 1000 + b".")
    folder.check_refused("was refused: it holds more than plain tensors (opcode DUP)")
