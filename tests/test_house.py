"""The house keeps its order: who imports whom, what is private, and where libraries are loaded."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import horse_plugin
from tests import ROOT

PACKAGE = ROOT / "horse_plugin"
# Each may import those before it.
ORDER = """errors progress assets data distributed method storage foreign hparams model evaluation
    editing training easyedit comparison cli __main__""".split()
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The package, or the module of the top level, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports, wherever in it; no name for a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written from the root"
            yield from ((node.module, alias.name) for alias in node.names)


def test_every_part_is_in_the_order():
    assert {part_of(p) for p in SOURCES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_part_imports_only_those_before_it_and_nothing_private(path):
    for module, name in imports(path):
        root, *inside = module.split(".")
        if root != "horse_plugin":
            continue
        assert not name.startswith("_") and not any(i.startswith("_") for i in inside)
        part = inside[0] if inside else name
        if part_of(path) != "__init__":
            assert ORDER.index(part) <= ORDER.index(part_of(path)), f"{path} imports {module}"


OF_LIBRARIES = {"_version", "_name_or_path"}  # torch counts writes to a weight in the first


def test_no_private_attribute_of_another_file_is_used():
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        own |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store)}
        private = {n.attr for n in attributes if n.attr.startswith("_") and n.attr[:2] != "__"}
        assert private <= own | OF_LIBRARIES, path


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("matplotlib", ("evaluation/charts.py",)),
        ("easyeditor", ("easyedit/", "comparison/baselines/")),
        ("unittest", ()),
    ],
)
def test_a_library_is_imported_in_its_place_only(library, places):
    found = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        for module, _ in imports(path)
        if module.split(".")[0] == library
    }
    assert bool(found) == bool(places)
    assert all(file.startswith(places) for file in found)


def test_every_package_says_what_is_in_it():
    for init in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(init.read_text())) or ""
        names = {p.stem for p in init.parent.glob("*.py")} - {"__init__"}
        assert text and all(name in text for name in names), f"{init}: {names}"


def test_the_public_names_are_listed_imported_and_found_alike():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(horse_plugin.__all__) == imported - {"TYPE_CHECKING", "hook"}
    assert all(getattr(horse_plugin, name) is not None for name in horse_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Horse'"):
        horse_plugin.Horse  # noqa: B018


def test_every_public_function_and_class_has_a_docstring():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_every_equation_has_a_test_that_names_it():
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    for name in ("Eq. 2", "Eq. 4", "Eq. 5", "Eq. 6", "Eq. 7", "Sec. 2.3"):
        assert name in tests, name
