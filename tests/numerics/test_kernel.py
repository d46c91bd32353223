import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

import v4quant.numerics
from v4quant.numerics._kernel import kernel

FOLDER = Path(v4quant.numerics.__path__[0])


def double(number: int) -> int:
    return 2 * number


def test_a_kernel_compiles_where_there_is_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numba.njit

    def without_a_place(*arguments: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*arguments, **options)

    monkeypatch.setattr(numba, "njit", without_a_place)
    assert kernel(double)(21) == 42


def built_on(path: Path, known: set[Path]) -> Iterator[Path]:
    """The numerics modules that a module imports, directly or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("v4quant.numerics."):
            imported = FOLDER / f"{node.module.rpartition('.')[2]}.py"
            if imported not in known:
                known.add(imported)
                yield imported
                yield from built_on(imported, known)


@pytest.mark.parametrize("name", ["fp4_kernels", "fp8_kernels", "measure"])
def test_cached_machine_code_cannot_outlive_what_it_is_built_on(name: str) -> None:
    path = FOLDER / f"{name}.py"
    modules = sorted(built_on(path, {path}))
    assert FOLDER / "_kernel.py" in modules
    expected = hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:16]
    found = re.search("^# built on ([0-9a-f]{16}) ", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None and found[1] == expected, f"{path.name}: write `# built on {expected} (see _kernel)`"


def test_every_module_with_kernels_is_checked() -> None:
    users = {path.stem for path in FOLDER.glob("*.py") if "@kernel" in path.read_text(encoding="utf-8")}
    assert users == {"fp4_kernels", "fp8_kernels", "measure"}
