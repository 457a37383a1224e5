"""README and docs/ against the code: every path, function, flag and link that they name exists. docs/departures.md has
every numbered departure of a script. The code reads every flag. Every test file states what it proves."""

import ast
import re
from functools import cache

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("results", "scale", "data", "mmeb", "departures"))]
SCRIPTS = ("sft.py", "rl.py", "eval.py")
SIX = [ROOT / name for name in (*SCRIPTS, "reward.py", "model.py", "data.py")]  # a user may add scripts
CODE = [*SIX, *ROOT.glob("support/*.py")]
page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def names_in(path):
    """Return functions, classes, methods and assigned names of a file; a method also as Class.method."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def prose(page):
    """Return a page without its code blocks."""
    return "".join(page.read_text(encoding="utf-8").split("```")[::2])


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


@page_of
def test_paths_exist(page):
    """`support/mmeb.py`, `docs/scale.md`, `assets/..`: a path of the repository exists."""
    ours = [span for span in spans(page) if re.fullmatch(r"(docs|tests|support|assets)/[\w./-]+|[\w./-]+\.py", span)]
    folders = [ROOT, ROOT / "support", ROOT / "tests", ROOT / "tests/bench", ROOT / "docs"]
    lacking = [path for path in ours if not any((folder / path).exists() for folder in folders)]
    assert not lacking, lacking


@page_of
def test_functions_exist(page):
    """`sft.py` `info_nce`, `sft_step`: each name that follows a file's name is one of that file."""
    lacking = []
    for file, names in re.findall(r"`((?:support/|tests/)?\w+\.py)`((?:,? (?:and )?`[\w.]+`)+)", prose(page)):
        for name in re.findall(r"`([\w.]+)`", names):
            if name.endswith(".py"):  # the next file and its names
                file = name
            elif name not in names_in(ROOT / file):
                lacking.append((file, name))
    assert not lacking, lacking


@page_of
def test_links_resolve(page):
    """Relative links and images lead to files, anchors to headings."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        goal = (page.parent / file) if file else page
        assert goal.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def settings_of(script):
    """Return the flags of the script: the fields of its Settings."""
    (settings,) = [node for node in tree_of(ROOT / script).body if getattr(node, "name", "") == "Settings"]
    return {part.target.id for part in settings.body if isinstance(part, ast.AnnAssign)}


@page_of
def test_flags_exist(page):
    """--flags in the text are flags of some command of ours or of a known tool."""
    known = {flag for script in SCRIPTS for flag in settings_of(script)}
    for path in [ROOT / "data.py", *ROOT.glob("support/*.py"), *ROOT.glob("tests/**/*.py")]:
        known |= set(re.findall(r"\"--(\w+)\"", path.read_text(encoding="utf-8")))
    tools = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown", "max", "help"}
    lacking = {flag for flag in re.findall(r"--(\w+)", " ".join(spans(page)))} - known - tools
    assert not lacking, lacking


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    """Each flag is read as an attribute, in the script or in support/."""
    read = {node.attr for path in CODE for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    assert settings_of(script) - {"preset"} <= read
    assert "--preset" in (ROOT / "support/settings.py").read_text(encoding="utf-8")  # read before the other flags


def test_departures_are_complete():
    """docs/departures.md names each numbered departure of each script, and no other."""
    numbered, named = set(), set()
    for path in SIX:
        items = re.findall(r"^ ?(\d)\. ", ast.get_docstring(tree_of(path), clean=False), re.MULTILINE)
        numbered |= {(path.name, number) for number in items}
    page = " ".join((ROOT / "docs/departures.md").read_text(encoding="utf-8").split())
    for script, numbers in re.findall(r"`(\w+\.py)` (\d(?: and \d)*)", page):
        named |= {(script, number) for number in re.findall(r"\d", numbers)}
    assert named == numbered


def test_the_form_of_tests_and_readme():
    """A test file says what it proves. The README has at most 200 lines of at most 110 characters."""
    for path in (ROOT / "tests").glob("*.py"):
        says = ast.get_docstring(tree_of(path))
        assert says, f"{path.name} has no docstring"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 110
