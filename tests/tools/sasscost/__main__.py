"""Print the report of a cubin: python -m sasscost file.cubin."""

from __future__ import annotations

import argparse
import sys

from .model import analyze
from .report import to_json, to_text


def main(argv=None):
    p = argparse.ArgumentParser("sasscost", description="static cost report for a cubin")
    p.add_argument("cubin", help="path of the cubin")
    p.add_argument(
        "--arch", help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (default: the cubin's)"
    )
    p.add_argument("--smem", type=int, default=0, help="dynamic shared memory, bytes")
    p.add_argument(
        "--warps",
        type=int,
        help="warps per CTA (default: REQNTID / 32, else launch bounds / 32, else 4)",
    )
    p.add_argument(
        "--loop-warps", default="", help="warps per loop, instead of those found, as in L2:8,L3:4"
    )
    p.add_argument("--tmem", type=int, default=0, help="tensor-memory columns per CTA (sm_100)")
    p.add_argument("--kernel", help="report only kernels whose name has this substring")
    p.add_argument(
        "--geforce", action="store_true", help="use the tensor rate of GeForce GPUs (half)"
    )
    p.add_argument("--main-only", action="store_true", help="print details of main loops only")
    p.add_argument("--json", action="store_true", help="print JSON")
    a = p.parse_args(argv)
    lw = {x.split(":")[0]: int(x.split(":")[1]) for x in a.loop_warps.split(",") if x}
    r = analyze(a.cubin, a.arch, a.warps, a.smem, lw, a.kernel, a.tmem, a.geforce)
    print(to_json(r) if a.json else to_text(r, not a.main_only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
