"""Attributes of the kernels in a cubin, read from its ELF sections.

The `.nv.info*` sections hold records of (format: u8, attribute: u8, value). Format 4 is followed by
a u16 size and a payload, formats 1 to 3 by a 16-bit immediate. `cuobjdump -elf` prints the names of
the attribute numbers.
"""

from __future__ import annotations

import struct

ATTR = {
    0x2F: "REGCOUNT",
    0x11: "FRAME_SIZE",
    0x12: "MIN_STACK_SIZE",
    0x10: "REQNTID",
    0x05: "MAX_THREADS",
}


def _sections(b):
    if b[:4] != b"\x7fELF" or b[4] != 2:
        raise ValueError("cubin must be a 64-bit ELF file")
    (shoff,) = struct.unpack_from("<Q", b, 0x28)
    shentsize, shnum, shstrndx = struct.unpack_from("<HHH", b, 0x3A)
    raw = [struct.unpack_from("<IIQQQQIIQQ", b, shoff + i * shentsize) for i in range(shnum)]
    stroff = raw[shstrndx][4]
    out = []
    for h in raw:
        e = b.index(b"\0", stroff + h[0])
        out.append((b[stroff + h[0] : e].decode(), h))
    return out


def _records(data):
    i = 0
    while i + 4 <= len(data):
        fmt, attr, val = struct.unpack_from("<BBH", data, i)
        i += 4
        if fmt == 4:
            yield attr, data[i : i + val]
            i += val
        else:
            yield attr, val


def kernel_attributes(b):
    """Return the attributes of each kernel in the bytes of a cubin.

    `linear` is False if the required CTA size has more than one dimension.
    """
    secs = _sections(b)
    sym = None
    for _, h in secs:
        if h[1] == 2:  # SHT_SYMTAB
            sym = h
    strtab = secs[sym[6]][1] if sym else None

    def symname(i):
        (o,) = struct.unpack_from("<I", b, sym[4] + 24 * i)
        s = strtab[4] + o
        return b[s : b.index(b"\0", s)].decode()

    res = {}

    def blank():
        return {
            "regs": 0,
            "stack": 0,
            "static_smem": 0,
            "reqntid": None,
            "max_threads": None,
            "linear": True,
            "code_bytes": 0,
        }

    for name, h in secs:
        if name.startswith(".text."):
            res.setdefault(name[6:], blank())["code_bytes"] = h[5]
    for name, h in secs:
        data = b[h[4] : h[4] + h[5]]
        if name == ".nv.info":
            for attr, v in _records(data):
                a = ATTR.get(attr)
                if (
                    a in ("REGCOUNT", "MIN_STACK_SIZE", "FRAME_SIZE")
                    and isinstance(v, bytes)
                    and len(v) >= 8
                ):
                    s, n = struct.unpack_from("<II", v)
                    k = symname(s)
                    if k in res:
                        f = {"REGCOUNT": "regs"}.get(a, "stack")
                        res[k][f] = max(res[k][f], n)
        elif name.startswith(".nv.info.") and name[9:] in res:
            k = res[name[9:]]
            for attr, v in _records(data):
                a = ATTR.get(attr)
                if a in ("REQNTID", "MAX_THREADS") and isinstance(v, bytes) and len(v) >= 12:
                    x, y, z = struct.unpack_from("<III", v)
                    k["reqntid" if a == "REQNTID" else "max_threads"] = x * y * z
                    if a == "REQNTID" and y * z > 1:
                        k["linear"] = False
        elif name.startswith(".nv.shared.") and name[11:] in res:
            # From sm_90 on, the section includes the KiB that the system reserves per CTA.
            # `occupancy` adds this KiB, so it is subtracted here.
            held = any(n.startswith(".nv.shared.reserved") for n, _ in secs)
            res[name[11:]]["static_smem"] = h[5] - 1024 if held and h[5] >= 1024 else h[5]
    return res
