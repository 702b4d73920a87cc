"""Reports as text and as JSON."""

from __future__ import annotations

import json


def clean(report):
    """Return a report without its `Counts` objects, which JSON cannot represent."""
    if isinstance(report, dict):
        return {k: clean(v) for k, v in report.items() if k not in ("counts", "total_counts")}
    if isinstance(report, list):
        return [clean(x) for x in report]
    return report


def to_json(reports):
    return json.dumps(clean(reports), indent=1)


def percent(x):
    return "-" if x is None else f"{100 * x:.0f} %"


def ranges(warps):
    """Return numbers as ranges: [0, 1, 2, 5] as "0-2,5"."""
    runs = []
    for w in warps:
        if runs and runs[-1][1] == w - 1:
            runs[-1][1] = w
        else:
            runs.append([w, w])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def to_text(reports, all_loops=True):
    """Return reports as text, with details of all loops or of the main loops only."""
    lines = []
    for kernel in reports:
        lines += _kernel_lines(kernel)
        for loop in kernel["loops"]:
            is_main = loop["name"] == kernel["main_loop"]
            lines.append(_loop_head(loop) + (" <- main" if is_main else ""))
            if all_loops or is_main:
                pad = "    " + "  " * loop["depth"]
                lines += [pad + line for line in _loop_lines(loop)]
        lines.append("")
    return "\n".join(lines)


def _counts(counts, spills):
    text = " ".join(f"{name}:{n}" for name, n in counts.items())
    return text + (f"  SPILLS {spills}" if spills else "")


def _kernel_lines(kernel):
    occupancy = kernel["occupancy"]
    classes = _counts(kernel["classes"], kernel["spill_instructions"])
    lines = [
        f"{kernel['kernel'][:100]}  [{kernel['arch']}]",
        f"  regs {kernel['regs']}  stack {kernel['stack']} B  "
        f"smem {kernel['static_smem']}+{kernel['dynamic_smem']} B  "
        f"warps/CTA {kernel['threads'] // 32}  CTAs/SM {occupancy['ctas_per_sm']} "
        f"({', '.join(occupancy['limited_by'])})  warps/SM {occupancy['warps_per_sm']}",
        f"  total {kernel['instructions']} instr: {classes}",
    ]
    for p in kernel["partitions"]:
        if p["warps"] is None:
            which = f"of {p['count']} warps (from its barrier)"
        else:
            which = f"warps {ranges(p['warps'])}"
        if p["warps_from"] == "unknown":
            which += " (upper bound)"
        lines.append(
            f"  partition {which}: {p['role']}, {p['regs']} registers"
            f"{' (setmaxnreg)' if p['setmaxnreg'] else ''}, loops {' '.join(p['loops'])}"
        )
    if kernel["register_pool"]:
        requested, provided = kernel["register_pool"]
        lines.append(
            f"  setmaxnreg requests {requested} registers x warps, the launch provides "
            f"{provided}{'  TOO MANY' if requested > provided else ''}"
        )
    serialized, hgmmas = kernel["serialized_wgmma"]
    if serialized:
        lines.append(f"  SERIALIZED WGMMA: {serialized} of {hgmmas} in the kernel")
    return lines


def _loop_head(loop):
    start, end = loop["addr"]
    warps, own = loop["bounds"]["warps"], loop["own_warps"]
    return (
        f"  {'  ' * (loop['depth'] - 1)}{loop['name']} 0x{start:x}-0x{end:x} "
        f"{loop['steady_instructions']} instr (body {loop['body_instructions']}, warps {warps}"
        f"{f', own {own}' if own != warps else ''})"
        f"{' dispatches partitions' if loop['dispatch'] else ''}"
    )


def _loop_lines(loop):
    bounds = loop["bounds"]
    lines = [_counts(loop["classes"], loop["spills"])]
    if loop["tensor_ops"]:
        ops = ", ".join(f"{n} x {name}" for name, n in loop["tensor_ops"].items())
        unresolved = loop["unresolved_mma"]
        lines.append(f"mma: {ops}{f'  ({unresolved} unresolved)' if unresolved else ''}")
    cycles = " ".join(f"{pipe} {n:g}" for pipe, n in bounds["cycles"].items())
    lines.append(f"SM clocks/trip: {cycles}")
    if loop["dispatch"]:
        return lines
    if "bound_a" in bounds:
        covered, mufus = loop["mufu_under_wgmma"]
        lines.append(
            f"non-MMA/MMA {bounds['nonmma_per_mma']} "
            f"(per HMMA-equivalent {bounds['nonmma_per_hmma_equiv']})  "
            f"bound (a) {percent(bounds['bound_a'])} [{bounds['limiter_a']}] "
            f"= {bounds['tflops_a']:g} TFLOP/s  "
            f"(b) {percent(bounds['bound_b'])} = {bounds['tflops_b']:g}  "
            f"est (m) {percent(bounds['est_m'])} = {bounds['tflops_m']:g}  "
            f"units {bounds['units']:g}  CTA barriers {loop['cta_barriers']}  "
            f"MUFU under wgmma {covered}/{mufus}"
        )
    waits, barriers, ping_pong = loop["wgmma_waits"], loop["barriers"], loop["pingpong"]
    if waits["hgmma"]:
        lines.append(
            f"wgmma: {waits['hgmma']} HGMMA, {waits['depbars']} DEPBAR, "
            f"{waits['alone']} waited for alone"
        )
    if waits["serialized"]:
        lines.append(
            f"SERIALIZED WGMMA: {waits['serialized']} of {waits['hgmma']}: "
            "each is waited for before the next is issued"
        )
    if barriers["partition"] or barriers["ordered"]:
        lines.append(
            f"barriers of some warps: {barriers['partition']} synchronize a partition, "
            f"{barriers['ordered']} order warps"
        )
    if ping_pong:
        lines.append(
            f"ping-pong of {ping_pong['units']} warpgroups by named barriers "
            f"{', '.join(map(str, ping_pong['ids']))} ({ping_pong['threads']} threads): "
            f"{percent(ping_pong['mufu_share'])} of the MUFU clocks fit under the others' wgmma"
        )
    return lines
