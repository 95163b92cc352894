"""The layers: imports go down only, and each engine is imported in its own module only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmx"

LAYERS = """
    errors
    config
    generation
    messages
    gguf_header mlx_folder kv_cache inventory
    hub embedders tool_calls
    staging tool_parsers output
    chat_template
    backends backends.prefix_tree backends.lookup backends.borders
    model_roots dialect grammars prefix_folder selftest
    constraints gguf_tokenizer catalog backends.llama backends.mlx_sampling backends.gguf_sampling
    backends.mlx_cache backends.mlx_model backends.gguf_model backends.gguf_snapshots
    answer convert backends.mlx_head backends.mlx_batch backends.mlx_bert backends.mlx_prefix
    backends.gguf_cells backends.gguf_rows backends.mlx_prefill
    prompt backends.gguf_draft backends.mlx_draft
    backends.mlx backends.gguf backends.mlx_embedding backends.gguf_embedding
    runner memory loading
    runner_process schema
    inference
    records chat_schema completions_schema
    openai_answers logs
    slot streaming downloader state
    guard
    registry
    reload
    endpoint
    openai_api anthropic_api lmstudio_api admin_api access openapi page
    events metrics
    app
    serve
    bench_client client steps terminal daemon_plist
    bench_scenarios launchd
    bench completion doctor cli
    bench_engine
    __main__
"""  # lowest first; a module imports only from lines above its own
LEVEL = {m: n for n, line in enumerate(LAYERS.strip().splitlines()) for m in line.split()}

LAZY = {
    ("backends", "load", f"backends.{engine}")
    for engine in ("mlx", "gguf", "mlx_embedding", "gguf_embedding")
}
"""(module, function, import) that may point up: the choice of the engine."""

MLX = {module for module in LEVEL if module.startswith("backends.mlx")}
LLAMA = {"backends.llama"} | {module for module in LEVEL if module.startswith("backends.gguf")}
ALLOWED = {
    "mlx": {*MLX, "convert"},
    "mlx_lm": {*MLX, "convert"},
    "tokenizers": {"backends.mlx_model", "backends.mlx_embedding", "convert", "gguf_tokenizer"},
    "transformers": {"backends.mlx_model", "convert"},
    "llama_cpp": LLAMA,
    "numpy": {*LLAMA, *MLX, "convert"},
    "llguidance": {"constraints", "grammars"},
    "huggingface_hub": {"hub"},
}
"""Where each engine, and Hugging Face's client, may be imported."""

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str, source: str) -> Iterator[tuple[str, str]]:
    """(enclosing function, absolute name) of everything that `lmx.<module>` imports."""
    is_package = FILES.get(module, PACKAGE).name == "__init__.py"
    package = ["lmx", *module.split(".")][: None if is_package else -1]

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Import):
            yield from ((function, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = ".".join([*base, *filter(None, [node.module])])
            yield from ((function, f"{path}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(ast.parse(source), "")


def faults(module: str, source: str) -> list[str]:
    """Imports in `source` that `lmx.<module>` must not have."""
    found = []
    for function, name in imports(module, source):
        root, _, inner = name.partition(".")
        if root == "lmx":
            while inner and inner not in LEVEL:  # a name inside a module
                inner = inner.rpartition(".")[0]
            up = inner and LEVEL[inner] >= LEVEL[module]
            if up and (module, function, inner) not in LAZY:
                found.append(f"{module} -> {inner}")
        elif module not in ALLOWED.get(root, {module}):
            found.append(f"{module} -> {root}")
    return found


@pytest.mark.parametrize("module", [module for module in FILES if module != "__init__"])
def test_imports_go_down(module: str) -> None:
    """Every module has its place in the table and imports only what lies below it."""
    assert module in LEVEL, f"give lmx/{module} a place in LAYERS"
    assert faults(module, FILES[module].read_text()) == []


def test_package_imports_nothing() -> None:
    """lmx/__init__.py holds the version and nothing else."""
    assert list(imports("__init__", FILES["__init__"].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("config", "from .errors import ConfigError", []),
        ("errors", "from .config import Config", ["errors -> config"]),
        ("errors", "from . import config", ["errors -> config"]),
        ("errors", "import lmx.config", ["errors -> config"]),
        ("errors", "from . import __version__", []),
        ("schema", "from .slot import x", ["schema -> slot"]),
        ("backends.mlx", "from ..errors import x\nfrom . import Sequence", []),
        ("backends.mlx", "from .gguf import x", ["backends.mlx -> backends.gguf"]),
        ("backends.mlx", "from ..runner import x", ["backends.mlx -> runner"]),
        ("backends", "def load():\n  from .mlx import x", []),
        ("backends", "def other():\n  from .mlx import x", ["backends -> backends.mlx"]),
        ("backends", "from .mlx import x", ["backends -> backends.mlx"]),
        ("app", "def f():\n  import mlx.core as mx", ["app -> mlx"]),
        ("convert", "import mlx.core as mx\nfrom tokenizers import Tokenizer", []),
        ("backends.mlx", "from llama_cpp import Llama", ["backends.mlx -> llama_cpp"]),
        ("registry", "from huggingface_hub import HfApi", ["registry -> huggingface_hub"]),
    ],
)
def test_faults_are_found(module: str, source: str, expected: list[str]) -> None:
    """The check itself sees an upward import and a misplaced engine in every spelling."""
    assert faults(module, source) == expected


def test_server_imports_no_engine() -> None:
    """The server process holds no engine and no Hugging Face client: runners do that."""
    engines = [*ALLOWED, "numpy"]
    code = f"import sys, lmx.app; print(*sorted(sys.modules.keys() & set({engines})))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (output.stdout.split(), output.stderr) == ([], "")
