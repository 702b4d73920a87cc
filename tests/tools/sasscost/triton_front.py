"""Reports of Triton and Gluon kernels, compiled ahead of time for any target."""

from __future__ import annotations

from .model import analyze


def analyze_compiled(kernel, arch=None, loop_warps=None, warps=None):
    """Return the reports of a compiled kernel (triton.compiler.CompiledKernel); see `analyze`."""
    metadata = kernel.metadata
    reports = analyze(
        kernel.asm["cubin"],
        arch=arch or f"sm_{metadata.target.arch}",
        smem=metadata.shared,
        warps=warps or metadata.num_warps,
        loop_warps=loop_warps,
        tmem_cols=getattr(metadata, "tmem_size", 0) or 0,
    )
    for report in reports:
        report["num_warps"] = metadata.num_warps
        report["num_stages"] = getattr(metadata, "num_stages", None)
    return reports


def compile_aot(
    function, signature, constexprs, arch, num_warps=4, num_stages=3, divisible_by_16=(), **options
):
    """Compile a @triton.jit or @gluon.jit function for `arch` (80, 90, 100, 120, ...).

    `signature` maps an argument to its type: "*bf16", "i32", "fp32", "tensordesc<...>". Pointers
    and the arguments named in `divisible_by_16` are assumed to be divisible by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if type(function).__name__.startswith("Gluon"):
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    names = list(function.arg_names)
    types = {n: "constexpr" if n in constexprs else signature[n] for n in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in divisible_by_16 or types[n].startswith("*")
    }
    return triton.compile(
        ASTSource(function, types, dict(constexprs), divisible),
        target=GPUTarget("cuda", int(arch), 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **options},
    )


def analyze_jit(function, signature, constexprs, arch, loop_warps=None, **options):
    """Compile a function with `compile_aot` and return its reports."""
    kernel = compile_aot(function, signature, constexprs, arch, **options)
    return analyze_compiled(kernel, f"sm_{arch}", loop_warps)
