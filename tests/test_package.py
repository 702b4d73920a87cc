"""The package: modules that its import loads, import layers, public signatures."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mistral_kernels

ROOT = Path(mistral_kernels.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
HEAVY = {
    "triton",
    "transformers",
    "mistral_common",
    "huggingface_hub",
    "tokenizers",
    "sentencepiece",
    "matplotlib",
}

# A module may import modules of its own entry and of earlier layers. The entry of a module is the
# longest one that its name begins with.
LAYERS = (
    ("utils",),
    ("ops", "model.config_formats"),
    ("model.config",),
    ("checkpoint",),
    ("model", "tokenizer"),
    ("cli", "flash_attn", "integrations", "text"),
    ("distributed",),
    ("training", "cli.chat"),
    ("convert", "generate", "train"),
)
# Modules that import no other module of this package: cli.startup runs before the others, setup.py
# loads ops.compiler alone, and ops.reference defines the results of the others.
ALONE = {"cli.startup", "ops.compiler", "ops.reference"}
ENTRY_POINTS = {"", "__main__", "cli.report"}  # may import any layer; no module may import them


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports_of(path: Path, in_functions: bool = True):
    """Yield (name, whether importing the module at `path` runs the import) for every import."""
    tree = ast.parse(path.read_text())
    blocks = [x for x in ast.walk(tree) if isinstance(x, (ast.FunctionDef, ast.If))]
    functions = [x for x in blocks if isinstance(x, ast.FunctionDef)]
    for_types = [x for x in blocks if x not in functions and ast.unparse(x.test) == "TYPE_CHECKING"]
    inside = {id(node) for block in functions for node in ast.walk(block)}
    lazy = inside | {id(node) for block in for_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in inside and not in_functions:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # The imported name may be a module, or a name in a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from ((name, id(node) not in lazy) for name in names)


def short(module: str) -> str:
    return module.removeprefix("mistral_kernels").removeprefix(".")


def is_inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_import_loads_no_heavy_modules():
    """Importing the package does not initialize CUDA either."""
    code = f"""
import sys, torch
before = set(sys.modules)
import mistral_kernels
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new & {HEAVY!r}), torch.cuda.is_initialized())
"""
    assert python("-c", code).split() == ["False"]


def entry_of(module: str) -> tuple[int, str] | None:
    """Return the index of a module's layer and its entry there; None for an entry point."""
    name = short(module)
    if name in ENTRY_POINTS:
        return None
    entries = [
        (i, entry) for i, layer in enumerate(LAYERS) for entry in layer if is_inside(name, entry)
    ]
    assert entries, f"{module} is in no layer"
    return max(entries, key=lambda entry: len(entry[1]))


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_earlier_layers(module):
    own = entry_of(module)
    for imported, at_top in imports_of(MODULES[module]):
        top = imported.partition(".")[0]
        assert top not in ("tests", "benchmarks"), f"{module} imports {imported}"
        # `integrations` may import transformers at the top: its users have it or get a clear error.
        allowed = is_inside(short(module), "integrations") and top == "transformers"
        assert allowed or not (at_top and top in HEAVY), f"{module} imports {top} before it is used"
        if top == "mistral_kernels" and own is not None:
            theirs = entry_of(imported)
            assert theirs is not None, f"{module} imports {imported}"
            assert theirs == own or theirs[0] < own[0], f"{module} imports {imported}"
            assert short(module) not in ALONE, f"{module} imports {imported}"


def test_no_circular_imports():
    """Imports for type checkers count as well."""
    imports = {
        module: {name for name, _ in imports_of(path, in_functions=False) if name in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(imports[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_block_pointers():
    """Later versions of Triton have no tl.make_block_ptr."""
    for path in MODULES.values():
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "attr")
        }
        assert "make_block_ptr" not in names, path


# The parameters of flash-attn 2's functions after the tensors, in the same order.
FLASH_ATTN = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
OPERATORS = {
    "flash_attn_func": f"q, k, v, {FLASH_ATTN}",
    "flash_attn_kvpacked_func": f"q, kv, {FLASH_ATTN}",
    "flash_attn_qkvpacked_func": f"qkv, {FLASH_ATTN}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {FLASH_ATTN}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {FLASH_ATTN}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FLASH_ATTN}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
    "apply_rotary": "q, k, cos, sin, positions, interleaved=False",
    "apply_rotary_": "q, k, cos, sin, positions, interleaved=False",
    "attention": (
        "q, k, v, *, causal=True, sliding_window=None, window_size=None, softmax_scale=None, "
        "softcap=0.0, alibi_slopes=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, return_lse=False"
    ),
    "linear_cross_entropy": (
        "hidden, weight, targets, ignore_index=-100, reduction='mean', label_smoothing=0.0, "
        "z_loss=0.0, softcap=0.0"
    ),
    "pipeline": (
        "task='text-generation', model=None, *, tokenizer=None, dtype=None, torch_dtype=None, "
        "device=None, device_map=None, trust_remote_code=None, use_fast=None, model_kwargs=None, "
        "**options"
    ),
    "rms_norm": "x, weight, eps=1e-05, residual=None",
    "rolling_cache_attention": (
        "q, k, v, k_cache, v_cache, lengths, cu_seqlens, max_seqlen, *, sliding_window, "
        "softmax_scale=None, counters=None"
    ),
    "rolling_cache_update_": (
        "k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, *, q=None, cos=None, sin=None, "
        "interleaved=False"
    ),
    "rotary_tables": "num_positions, head_dim, theta, device='cpu'",
    "swiglu": "gate, up=None",
}
CLASSES = {
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralTokenizer",
    "RollingCache",
    "Sampler",
}


def test_public_signatures_are_unchanged():
    assert mistral_kernels.__all__ == sorted(CLASSES | set(OPERATORS))
    for name, expected in OPERATORS.items():
        signature = inspect.signature(getattr(mistral_kernels, name))
        bare = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        assert str(inspect.Signature(bare)) == f"({expected})", name
