"""Disassembly of cubins by nvdisasm."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"^(\.L_[\w.]*|\$?[\w$.]+):\s*$")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_TARGET = re.compile(r"`\((\.L_[\w.]*|[\w$.]+)\)")
_TABLE = re.compile(r'BRANCH_TARGETS\s+([^"*]+)')


@dataclass
class Ins:
    """Instruction: address, predicate, mnemonic, operands, and labels that it may branch to."""

    addr: int
    pred: str
    op: str
    args: str
    targets: tuple = ()

    @property
    def dead(self):
        """Return whether the predicate is always false."""
        return self.pred in ("@!PT", "@!UPT")


def find_nvdisasm():
    """Return the path of nvdisasm: $NVDISASM, Triton's copy, or the one on PATH, in this order.

    An nvdisasm on PATH may be too old for the targets of Triton. Raises FileNotFoundError if there
    is no nvdisasm.
    """
    if os.environ.get("NVDISASM"):
        return os.environ["NVDISASM"]
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        if path.exists():
            return str(path)
    path = shutil.which("nvdisasm")
    if path is None:
        raise FileNotFoundError(
            "nvdisasm not found: set NVDISASM, install Triton or add nvdisasm to PATH"
        )
    return path


def disassemble(cubin):
    """Return nvdisasm's text for the bytes of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_nvdisasm(), "-c", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvdisasm failed: {result.stderr.strip()}")
    return result.stdout


def parse(text):
    """Return the target of nvdisasm's text, or None, and a dict from kernel name to its code.

    The code is the list of instructions, and a dict from label to the index of the instruction
    that follows it.
    """
    out, cur, labels, name, target = {}, None, None, None, None
    for line in text.splitlines():
        m = _SECTION.match(line)
        if m:
            name = m.group(1).strip('"')
            cur, labels = [], {}
            out[name] = (cur, labels)
            continue
        if target is None:
            t = re.search(r"EF_CUDA_SM(\d+)", line) or re.search(r"\.target\s+sm_(\d+)", line)
            if t:
                target = "sm_" + t.group(1)
        if re.match(r"^\s*\.section\s+\.(?!text)", line):
            cur = None
            continue
        if cur is None:
            continue
        m = _LINE.match(line)
        if m:
            addr, pred, op, args = m.groups()
            t = (
                tuple(_TARGET.findall(args))
                if op.split(".")[0] in ("BRA", "JMP", "CALL", "BSSY")
                else ()
            )
            tab = _TABLE.search(line)
            if tab:
                t = tuple(x.strip() for x in tab.group(1).split(",") if x.strip())
            cur.append(Ins(int(addr, 16), pred or "", op, args, t))
            continue
        m = _LABEL.match(line)
        if m:
            labels[m.group(1)] = len(cur)
    return target, {k: v for k, v in out.items() if v[0]}
