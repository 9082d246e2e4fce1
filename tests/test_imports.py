"""Which module may import what, and what `import foveate` costs and needs."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "foveate"
LEVELS = {
    "core": 0,
    "cache": 1,
    "composite": 1,
    "compress": 1,
    "linear": 1,
    "layers": 2,
    "vision": 3,
    "hf": 4,
    "organisms": 4,
    "bench": 5,
    "dist": 5,
    "catalogue": 6,
    "cli": 7,
}  # a room imports from lower levels and itself
FACADES = {"patterns": 0.5, "selectors": 0.5}  # foveate/patterns.py re-exports core's
OPTIONAL = (
    "transformers",
    "matplotlib",
    "click",
    "rich",
    "jinja2",
    "psutil",
    "tqdm",
    "pylatexenc",
    "latex2mathml",
    "pygments",
    "playwright",
)


def room(dotted: str) -> str | None:
    """The room of a module name; None for the package itself, whose names are lazy."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path: Path):
    """(line, module name, whether it runs when the module is imported) of every import in a file."""

    def walk(node: ast.AST, top: bool):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: imports here are absolute"
                assert child.module is not None
                if child.module == "foveate":  # `from foveate import hf`: a room, or one of its lazy names
                    for alias in child.names:
                        known = alias.name in LEVELS or alias.name in FACADES
                        yield child.lineno, f"foveate.{alias.name}" if known else "foveate", top
                else:
                    yield child.lineno, child.module, top
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk_one(statement)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, top and not inside)

    def walk_one(statement: ast.stmt):
        holder = ast.Module(body=[statement], type_ignores=[])
        yield from walk(holder, False)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


NEEDS_WEIGHTS = pytest.mark.skipif(
    not any((ROOT / "organisms" / "reader").rglob("*.safetensors")), reason="the reader has no weights yet"
)
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    mine = room(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    assert mine in LEVELS or mine in FACADES, f"{path.name} is in no known room"
    level = {**LEVELS, **FACADES}[mine]
    for line, name, _ in imports(path):
        if name.split(".")[0] != "foveate":
            continue
        other = room(name)
        where = f"{path.relative_to(ROOT.parent)}:{line} imports {name}"
        if other is None:
            assert level >= 1, f"{where}, which re-exports it"
        elif other != mine:
            assert other in LEVELS or other in FACADES, f"{where}: no such room"
            assert {**LEVELS, **FACADES}[other] < level, f"{where}: upward or sideways"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.is_relative_to(ROOT / "core")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_core_needs_torch_and_numpy_only(path):
    """Everything else that core imports is of the standard library, or imported where it is used."""
    for line, name, at_import in imports(path):
        base = name.split(".")[0]
        allowed = {"torch", "numpy", "foveate"} | ({"safetensors", "matplotlib"} if not at_import else set())
        assert base in allowed or base in sys.stdlib_module_names, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    """Only the room that is made of a package imports it at once, and says which extra is missing."""
    own = {"hf": ("transformers",), "cli": ("click",)}.get(path.relative_to(ROOT).parts[0], ())
    for line, name, at_import in imports(path):
        base = name.split(".")[0]
        if base in OPTIONAL and at_import and base not in own:
            pytest.fail(f"{path.name}:{line} imports {name} at import time")


def fresh(code: str, *, without: tuple[str, ...] = ()) -> str:
    """Run code in a new process in which some packages cannot be imported; its output."""
    hook = f"""
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {without!r} else find(name, *rest)
"""
    done = subprocess.run(
        [sys.executable, "-c", hook + code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_without_optional_packages():
    out = fresh(
        """
import torch
import foveate as fv
for module in list(sys.modules):
    assert module.split(".")[0] not in ("transformers", "matplotlib", "click", "rich", "jinja2")
q = torch.randn(1, 2, 300, 16)
k = v = torch.randn(1, 1, 300, 16)
pattern = fv.patterns.Causal() & (fv.patterns.SlidingWindow(40) | fv.patterns.Sinks(4))
out, lse = fv.attention(q, k, v, pattern, return_lse=True)
want = fv.attention(q, k, v, pattern.layout(300), engine="reference")
torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
selector = fv.selectors.FlexPrefill(block=64, min_budget=64)
fv.attention(q, k, v, selector, is_causal=True)
fv.merge([(out, lse)])
print(fv.explain(q, k, v, pattern).splitlines()[0])
""",
        without=OPTIONAL,
    )
    assert out.startswith("auto -> ")


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("fv.hf.apply", "hf"),
        pytest.param("fv.organisms.load('reader')", "hf", marks=NEEDS_WEIGHTS),
        ("fv.patterns.Causal().plot(100)", "viz"),
        ("fv.patterns.Causal().layout(100).plot()", "viz"),
        ("__import__('foveate.cli').cli.main()", "cli"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(code, extra):
    out = fresh(
        f"""
import foveate as fv
try:
    {code}
except ImportError as error:
    print(error)
except SystemExit as error:
    print(error.code if isinstance(error.code, str) else "")
""",
        without=OPTIONAL,
    )
    assert f"foveate[{extra}]" in out, out


def test_names_are_lazy_and_complete():
    out = fresh(
        """
import torch, foveate
loaded = [m for m in sys.modules if m.startswith("foveate.")]
assert not loaded, loaded
for name in foveate.__all__:
    if name not in ("hf", "organisms"):
        getattr(foveate, name)
assert set(foveate.__all__) <= set(dir(foveate))
try:
    foveate.nothing
except AttributeError as error:
    print(error)
"""
    )
    assert "no attribute 'nothing'" in out


@pytest.mark.slow
def test_import_takes_less_than_a_third_of_a_second_more_than_torch():
    code = """
import time, torch
start = time.perf_counter()
import foveate
print(time.perf_counter() - start)
"""
    assert statistics.median(float(fresh(code)) for _ in range(5)) < 0.3
