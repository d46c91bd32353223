"""The arrows of the architecture: every module's imports are walked, and one that points the wrong way fails."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import v4quant

PACKAGE = Path(v4quant.__file__).parent

# Modules that everyone may import.
COMMON = {"errors", "dtypes", "encodings", "strict_json", "config", "config_keys", "names", "inventory", "words"}
# Room -> rooms it may import besides itself and the common modules.
ARROWS = {
    "cli": {"hub", "parity", "testing", "model", "checkpoint", "formats", "budget", "chat"},
    "testing": {"kernels", "checkpoint", "formats", "numerics"},
    "hub": {"checkpoint", "parity"},
    "parity": {"model", "checkpoint"},
    "model": {"kernels", "checkpoint"},
    "kernels": {"numerics"},
    "checkpoint": {"formats", "numerics"},
    "formats": {"numerics"},
    "numerics": set(),
    "budget": set(),
    "chat": set(),
    # Common modules, each with those that it builds on.
    "errors": set(),
    "dtypes": set(),
    "encodings": set(),
    "strict_json": set(),
    "config": {"config_keys"},
    "config_keys": set(),
    "names": set(),
    "inventory": set(),
    "words": set(),
}
# Third parties and their homes, rooms or folders in one; what is listed nowhere may be imported nowhere.
THIRD_PARTIES = {
    "typer": {"cli"},
    "tqdm": {"cli"},
    "huggingface_hub": {"hub"},
    "httpx2": {"hub"},
    "llvmlite": {"numerics"},
    "numba": {"numerics"},
    "numpy": {"numerics", "formats", "checkpoint", "testing"},
    "torch": {"checkpoint", "kernels", "model", "parity", "testing"},
    "tokenizers": {"parity", "chat"},
    "triton": {"kernels"},
    "matplotlib": {"parity/report/plots", "budget/plot"},
}
# These run in `inspect` and `--help`, which must start at once.
LIGHT_MODULES = [
    *sorted(COMMON),
    *(f"checkpoint.{name}" for name in ("files", "header", "index", "detect", "audit", "reader", "layout")),
    *(f"checkpoint.process_{name}" for name in ("environment", "group", "store")),
    "hub.location",
    "cli.main",
    "cli._source",
    "cli._hub_run",
    "cli.convert",
    "cli.inspect_",
    *(f"budget.{name}" for name in ("layers", "kv_cache", "flops", "baselines", "gpu", "summary")),
    "cli.budget",
    *(f"chat.{name}" for name in ("messages", "turns", "encode", "decode", "tokenizer", "answer")),
]
HEAVY = {"numpy", "numba", "torch", "huggingface_hub", "httpx2"}


def imports_of(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str:
    """The room, or common module, that a dotted v4quant name belongs to."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_home(path: Path, homes: set[str]) -> bool:
    """Whether a module lies in one of these rooms or folders."""
    return any(path.relative_to(PACKAGE).with_suffix("").is_relative_to(home) for home in homes)


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_walk_finds_the_package() -> None:
    assert len(MODULES) > 30
    assert "v4quant.names" in set(imports_of(PACKAGE / "inventory.py"))


def test_a_home_is_a_room_or_a_folder_in_it() -> None:
    assert is_home(PACKAGE / "parity" / "report" / "plots" / "canvas.py", {"parity/report/plots"})
    assert is_home(PACKAGE / "parity" / "runs.py", {"model", "parity"})
    assert not is_home(PACKAGE / "parity" / "report" / "page.py", {"parity/report/plots"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports_of(path):
        top = name.split(".")[0]
        if top == "v4quant":
            target = room_of(name)
            allowed = COMMON | ARROWS.get(room, set()) | {room, "", "__version__"}
            if room in ("__init__", "__main__"):
                allowed |= {"cli"}
            assert target in allowed, f"{path.name} ({room}) imports {name}: against the arrows"
        elif top in THIRD_PARTIES:
            assert is_home(path, THIRD_PARTIES[top]), f"{path.name} ({room}) imports {top}"
        else:
            assert top in sys.stdlib_module_names, f"{path.name} imports {top}, which pyproject.toml does not declare"


def test_common_modules_have_no_cycle() -> None:
    graph = {
        name: {room_of(found) for found in imports_of(PACKAGE / f"{name}.py") if found.startswith("v4quant.")} & COMMON
        for name in COMMON
    }
    order: list[str] = []
    while graph:
        free = sorted(name for name, needs in graph.items() if not needs - set(order))
        assert free, f"import cycle among {sorted(graph)}"
        order += free
        graph = {name: needs for name, needs in graph.items() if name not in free}


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    path = PACKAGE / Path(*name.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & HEAVY
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in HEAVY
