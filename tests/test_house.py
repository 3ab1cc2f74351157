"""The house rules: data flows left to right, heavy imports are lazy, docs run."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flexmask"
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A module imports only what stands to its left (in an earlier line, or earlier in its own).
LEFT_TO_RIGHT = (
    *("errors", "files", "plots", "demo"),
    *("tree", "data", "packing", "backends", "model", "training"),
    *("integrations", "tools", "__main__"),
)


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_places(path):
    """Top-level flexmask modules that `path` imports, type checking and lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "flexmask":
                names = [f"flexmask.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "flexmask" and len(parts) > 1 and parts[1] in LEFT_TO_RIGHT:
                yield parts[1]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_to_their_left(path):
    place = LEFT_TO_RIGHT.index(place_of(path))
    for imported in imported_places(path):
        assert LEFT_TO_RIGHT.index(imported) <= place, f"{path.name} imports {imported}"


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import flexmask", "import flexmask.tools.cli", "from flexmask import render_samples"],
)
def test_imports_stay_light(statement):
    assert not loaded_after(statement) & {"torch", "triton", "transformers", "matplotlib"}


def test_the_mask_needs_torch_alone():
    assert not loaded_after("from flexmask import compile_mask") & {"triton", "transformers"}


def test_every_public_name_resolves_and_is_documented():
    import flexmask

    for name in flexmask.__all__:
        text = getattr(flexmask, name).__doc__ or f"{name}("
        assert not text.startswith(f"{name}("), "a dataclass writes that by itself"


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=lambda p: p.name)
def test_documents_and_examples_import_public_names_alone(path):
    import flexmask

    text = path.read_text()
    blocks = [text] if path.suffix == ".py" else python_blocks(path)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexmask"):
            assert node.module in ("flexmask", "flexmask.demo")
            if node.module == "flexmask":
                assert {alias.name for alias in node.names} <= set(flexmask.__all__)
    for name in re.findall(r"(?<![/\w])flexmask\.(\w+)[.(`]", text):
        assert name in (*flexmask.__all__, "demo", "json", "integrations"), (
            f"{path.name} names flexmask.{name}"
        )


def test_a_subpackage_does_not_hide_the_public_function():
    from flexmask import attention

    assert callable(attention)


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_code_blocks_run(path, tmp_path, monkeypatch):
    blocks = python_blocks(path)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{path.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_make_targets_in_the_docs_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", path.read_text(), re.MULTILINE)) <= targets


@pytest.mark.parametrize(
    "path", [p for p in modules() if ">>> " in p.read_text()], ids=lambda p: p.stem
)
def test_doctests_pass(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
