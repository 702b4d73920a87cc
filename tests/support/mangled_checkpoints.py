"""Read mangled checkpoints: `python mangled_checkpoints.py KIND COUNT SEED FOLDER`.

A program of test_mangled.py. It opens each checkpoint and reads all tensors. The values must be
those of an independent reader, or a CheckpointError or ConfigError must describe the fault in one
line. If the process crashes, FOLDER holds the files of the last case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import pickle
import pickletools
import random
import shutil
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peak_memory import peak_memory
from safetensors.torch import load_file
from test_pickles import HOSTILE, tensor_of

from mistral_kernels import MistralConfig
from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, save_hf, save_raw
from mistral_kernels.model.config import ConfigError
from support.small_checkpoints import State, random_state

CONFIG = MistralConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    sliding_window=5,
)
SECONDS = 20  # limit of one file
MEMORY = 300 << 20  # limit, in bytes, of the growth after the first file

Random = random.Random


def flipped(rng: Random, data: bytes) -> bytes:
    """Replace some bytes, most of them near the start or the end."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        offset = rng.randrange(min(rng.choice([16, 600, len(out)]), len(out)))
        out[rng.choice([offset, len(out) - 1 - offset])] = rng.randrange(256)
    return bytes(out)


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def grown(rng: Random, data: bytes) -> bytes:
    offset = rng.choice([0, len(data), rng.randrange(len(data))])
    return data[:offset] + rng.randbytes(rng.choice([1, 8, 1000])) + data[offset:]


def moved(rng: Random, data: bytes) -> bytes:
    """Copy a range of bytes over another range."""
    first, last, offset = (rng.randrange(len(data)) for _ in range(3))
    piece = data[min(first, last) : max(first, last)][:200]
    return data[:offset] + piece + data[offset + len(piece) :]


BYTES = [flipped, flipped, cut, grown, moved]

SCALARS: list[Any] = [None, True, False, 0, -1, 1, 2, 7, 1.5, 1e300, 2**31, 2**63, 2**64, -(2**63)]
SCALARS += ["", "x", "2", "false", "\n\x1b[2J", "\ud800", "0" * 5000]
KEYS = [*CONFIG.to_hf("float32"), *CONFIG.to_raw(), "rope_scaling", "text_config", "layer_types"]
KEYS += ["use_sliding_window", "moe", "quantization_config", "llama_4_scaling", "full_attention"]


def any_json(rng: Random, depth: int = 0) -> Any:
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(SCALARS)
    if rng.random() < 0.5:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): any_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def json_file(rng: Random, data: bytes) -> bytes:
    """Replace, remove, repeat or add values of a JSON file, or change its bytes."""
    if rng.random() < 0.2:
        return rng.choice(BYTES)(rng, data)
    contents = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        key = rng.choice([*contents, *KEYS])
        match rng.randrange(4):
            case 0:
                contents.pop(key, None)
            case 1:
                contents[key] = rng.choice([*contents.values(), None])
            case _:
                contents[key] = any_json(rng)
    text = json.dumps(rng.choice([contents] * 30 + [any_json(rng)]))
    if rng.random() < 0.1:
        text = text.replace("{", '{"vocab_size": 7, ', 1)  # may be a duplicate key
    if rng.random() < 0.1:
        number = rng.choice(["NaN", "Infinity", "1e999", "1" * 5000, "[" * 9999])
        text = text.replace("1", number, 1)
    return text.encode("utf-8", "surrogatepass")


def safetensors_file(rng: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, or its bytes."""
    if rng.random() < 0.3:
        return rng.choice(BYTES)(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name, other = rng.sample([name for name in header if name != "__metadata__"], 2)
    entry, repeated = header[name], dict(header[name])
    match rng.randrange(10):
        case 0:
            entry["dtype"] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "X"]
            )
        case 1:
            shape = entry["shape"]
            shapes = [[], shape[::-1], [*shape, 1], [1, *shape], [-1], [1.5], "x", None, [2**64]]
            entry["shape"] = rng.choice([*shapes, [0, 2**63], [2**32, 2**32]])
        case 2:
            offsets = [[0, 0], [0, 2**64], [-1, 3], [5, 1], [0], None]
            entry["data_offsets"] = rng.choice([*offsets, header[other]["data_offsets"]])
        case 3:
            entry["data_offsets"] = [x + rng.choice([-4, 4]) for x in entry["data_offsets"]]
        case 4:
            header[name], header[other] = header[other], entry
        case 5:
            names = ["", "a\nb", "\x1b[2J", "lm_head.weight", "x" * 9999, f"_orig_mod.{name}"]
            header[rng.choice([*names, name.removeprefix("model.")])] = header.pop(name)
        case 6:
            header[rng.choice([name, other])] = any_json(rng)
        case 7:
            header["__metadata__"] = any_json(rng)
        case 8:
            repeated["dtype"] = rng.choice(["I32", "F32"])
        case 9:
            pass
    text = json.dumps(header)
    if rng.random() < 0.15:
        text = text.replace("{", f"{{{json.dumps(name)}: {json.dumps(repeated)}, ", 1)
    encoded = text.encode("utf-8", "surrogatepass") + b" " * rng.randrange(9)
    claimed = len(encoded) + rng.choice([0] * 20 + [-1, 1, 8, 2**40])
    return claimed.to_bytes(8, "little") + encoded + body


def odd_pickle(rng: Random, state: State) -> bytes:
    """Save tensors of unusual strides, storages or types with torch.save."""
    state = dict(state)
    for name in rng.sample(sorted(state), 3):
        x = state[name]
        state[name] = rng.choice(
            [
                x.t().contiguous().t(),
                torch.stack([x, x], -1)[..., 1],
                x.half(),
                x.flip(0),
                torch.nn.Parameter(x),
                x[:1].expand(x.shape),
                torch.cat([x, x])[len(x) :],
            ]
        )
        if rng.random() < 0.03:
            state[name] = rng.choice([x[:0], x.long(), x.to_sparse(), torch._neg_view(x)])
    if rng.random() < 0.3:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    out = io.BytesIO()
    torch.save(rng.choice([state, OrderedDict(state)]), out, pickle_protocol=rng.choice([2, 2, 4]))
    return out.getvalue()


def mangled_pickle(rng: Random, data: bytes, marker: str) -> bytes:
    """Change bytes or insert opcodes, or return a pickle that calls a function."""
    match rng.randrange(4):
        case 0:
            return rng.choice(BYTES)(rng, data)
        case 1:
            offsets = [offset for _, _, offset in pickletools.genops(data)]
            for _ in range(rng.choice([1, 1, 3])):
                offset = rng.choice(offsets)
                opcode = rng.choice(pickletools.opcodes).code.encode("latin-1")
                argument = rng.randbytes(rng.choice([0, 0, 1, 4, 8]))
                data = data[:offset] + opcode + argument + data[offset + rng.randrange(2) :]
            return data
        case 2:
            numbers = [rng.choice([0, 1, 40, -1, 2**31, 2**62, 2**64, True, 1.5]) for _ in range(6)]
            offset, numel, *rest = numbers
            return tensor_of(offset, tuple(rest[:2]), tuple(rest[2:]), numel)
    return HOSTILE[rng.choice(sorted(HOSTILE))](marker)


def pickle_file(rng: Random, state: State, marker: str) -> bytes:
    """Return a file of torch.save with changed records or bytes."""
    data = odd_pickle(rng, state)
    kind = rng.random()
    if kind < 0.15:
        return data
    if kind < 0.4:
        return rng.choice(BYTES)(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    folder = next(iter(records)).partition("/")[0]
    compression = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    if kind < 0.75:
        pickled = f"{folder}/data.pkl"
        records[pickled] = mangled_pickle(rng, records[pickled], marker)
    else:
        name, other = rng.sample([name for name in records if "/data/" in name], 2)
        match rng.randrange(7):
            case 0:
                del records[name]
            case 1:
                records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
            case 2:
                records[name] += bytes(rng.choice([1, 4, 4000]))
            case 3:
                records[name], records[other] = records[other], records[name]
            case 4:
                records[f"{folder}/byteorder"] = rng.choice([b"big", b"little", b"", b"x" * 99])
            case 5:
                records[rng.choice(["x", "x/", f"{folder}/data.pkl", "a\nb/data/0"])] = (
                    b"\x80\x02)."
                )
            case 6:
                records[name] = rng.randbytes(len(records[name]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, contents in rng.sample(sorted(records.items()), len(records)):
            archive.writestr(name, contents)
    data = out.getvalue()
    return flipped(rng, data) if rng.random() < 0.1 else data


class PythonUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Reader of torch.save files without torch.load: zipfile, pickle and a short list of names."""

    # The size of a frame is a hint for buffers. Like the package, ignore a damaged one.
    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.FRAME[0]: lambda unpickler: unpickler.read(8),
    }

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.folder = archive, archive.namelist()[0].partition("/")[0]
        for record in archive.infolist():
            record.CRC = None  # type: ignore[assignment]  # other readers do not check it
        super().__init__(io.BytesIO(archive.read(f"{self.folder}/data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        allowed = ("OrderedDict", "_rebuild_tensor_v2", "_rebuild_parameter")
        assert name in allowed or name.endswith("Storage"), name
        return super().find_class(module, name)

    def persistent_load(self, identity: Any) -> Any:
        _, storage, key, _, numel = identity
        data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        assert len(data) == numel * storage.dtype.itemsize
        if not numel:
            data = bytearray(storage.dtype.itemsize)
        tensor = torch.frombuffer(data, dtype=storage.dtype)
        return torch.storage.TypedStorage(
            wrap_storage=tensor.untyped_storage(), dtype=storage.dtype, _internal=True
        )


def expected(file: Path) -> list[State]:
    """Return the tensors of a file, once per independent reader that accepts the file."""
    if file.suffix == ".safetensors":
        return [load_file(file)]
    with zipfile.ZipFile(file) as archive:
        found = [PythonUnpickler(archive).load()]
    # torch.load refuses more files, protocol 4 for instance. Without mmap it skips a record that
    # is marked as a folder.
    with contextlib.suppress(Exception):
        found.append(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return found


def check_values(folder: Path) -> None:
    """Open a checkpoint and compare all tensors with those of the independent readers."""
    checkpoint = open_checkpoint(folder)
    found = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    assert found.keys() == checkpoint.stored.keys()
    if checkpoint.format == "raw":
        return
    for file in {stored.file for stored in checkpoint.stored.values()}:
        for tensors in expected(file):
            read = {x.name: name for name, x in checkpoint.stored.items() if x.file == file}
            ignored = {name for name in tensors.keys() - read.keys() if "inv_freq" not in name}
            assert not ignored or checkpoint.config.tie_word_embeddings, ignored
            for name, hf_name in read.items():
                ours, theirs = found[hf_name], tensors[name].detach()
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
                theirs = theirs.contiguous()
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


def check_config(file: Path) -> None:
    """Compare a `config.json` with transformers, if both accept the file."""
    from transformers import AutoConfig

    try:
        contents = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return
    if not isinstance(contents, dict):
        return
    ours = MistralConfig.from_hf(contents)
    try:
        theirs = AutoConfig.for_model(**({"model_type": "mistral"} | json.loads(file.read_text())))
    except Exception:  # transformers refuses some accepted files: windows as strings, for instance
        return
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == theirs.head_dim or contents.get("head_dim") is None
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == bool(theirs.tie_word_embeddings)
    if not contents.get("layer_types"):
        assert ours.sliding_window == theirs.sliding_window


class Cases:
    """Valid checkpoints, and mangled copies of one kind."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.state = random_state(CONFIG)
        self.good, self.folder, self.kind = folder / "good", folder / "mangled", kind
        self.marker = folder / "made"
        for save, name in ((save_hf, "hf"), (save_raw, "raw")):
            save(self.state.items(), CONFIG, self.good / name, dtype=torch.float32)
        options = {"dtype": torch.float32, "max_shard_bytes": 1500}
        save_hf(self.state.items(), CONFIG, self.good / "sharded", **options)

    def mangle(self, rng: Random) -> Path:
        """Write a mangled checkpoint to `folder`; return its mangled file."""
        files: dict[str, list[tuple[str, Callable[[Random, bytes], bytes]]]] = {
            "safetensors": [("hf/model.safetensors", safetensors_file)],
            "pickles": [
                (
                    "hf/pytorch_model.bin",
                    lambda rng, _: pickle_file(rng, self.state, str(self.marker)),
                )
            ],
            "configs": [
                *[("hf/config.json", json_file)] * 4,
                *[("raw/params.json", json_file)] * 3,
                ("hf/generation_config.json", json_file),
                ("sharded/model.safetensors.index.json", json_file),
            ],
        }
        path, change = rng.choice(files[self.kind])
        source, _, name = path.partition("/")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good / source, self.folder)
        file = self.folder / name
        old = file.read_bytes() if file.exists() else b""
        if self.kind == "pickles":
            (self.folder / "model.safetensors").unlink()
        file.write_bytes(change(rng, old))
        return file


def run(kind: str, count: int, seed: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    cases = Cases(kind, folder)
    refused, started, before = 0, time.perf_counter(), 0
    for number in range(count):
        rng = random.Random(f"{seed} {kind} {number}")
        file = cases.mangle(rng)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(f"case {number}", file=sys.stderr)
        errors: list[Exception] = []
        try:
            check_values(cases.folder)
        except (CheckpointError, ConfigError) as error:
            assert str(cases.folder) in str(error), error  # the message must contain the path
            errors.append(error)
        if file.name == "config.json":
            try:
                check_config(file)
            except ConfigError as error:
                errors.append(error)
        for error in errors:
            assert str(error).isprintable(), error
            assert len(str(error)) <= 1000, error
        faulthandler.cancel_dump_traceback_later()
        assert not cases.marker.exists(), f"case {number} executed code of the checkpoint"
        refused += bool(errors)
        memory = peak_memory()
        before = before or memory
        assert memory < before + MEMORY, (
            f"case {number}: memory grew by {memory - before} bytes, at most {MEMORY} allowed"
        )
    seconds = time.perf_counter() - started
    print(f"{kind}: {count} files, {refused} refused, {seconds:.1f} s, seed {seed}")
    assert count / 50 < refused < count - count / 50


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
