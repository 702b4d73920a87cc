"""python -m sasscost file.cubin: print the report of a cubin."""

from __future__ import annotations

import argparse
import sys

from .model import analyse
from .report import to_json, to_text


def main(argv=None):
    p = argparse.ArgumentParser("sasscost", description="static cost report for a cubin")
    p.add_argument("cubin")
    p.add_argument(
        "--arch", help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (default: the cubin's)"
    )
    p.add_argument("--smem", type=int, default=0, help="dynamic shared memory, bytes")
    p.add_argument(
        "--warps", type=int, help="warps per CTA (default: required size or launch bounds / 32)"
    )
    p.add_argument(
        "--loop-warps", default="", help="e.g. L2:8,L3:4: overrides the warps found for a loop"
    )
    p.add_argument("--tmem", type=int, default=0, help="tensor-memory columns per CTA (sm_100)")
    p.add_argument("--kernel", help="substring of the kernel name")
    p.add_argument(
        "--geforce", action="store_true", help="GeForce tensor rate (half for fp32 accumulation)"
    )
    p.add_argument("--main-only", action="store_true")
    p.add_argument("--json", action="store_true")
    a = p.parse_args(argv)
    lw = {x.split(":")[0]: int(x.split(":")[1]) for x in a.loop_warps.split(",") if x}
    r = analyse(a.cubin, a.arch, a.warps, a.smem, lw, a.kernel, a.tmem, a.geforce)
    print(to_json(r) if a.json else to_text(r, not a.main_only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
