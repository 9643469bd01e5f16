# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site, and the notebook."""

import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from documents import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does: a link that leads nowhere, or a page without a place, is a warning and so an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_the_site(site: Path) -> None:
    """Each page is there, and what a room's face says that has a docstring; nothing is loaded from other hosts."""
    for page in [*(ROOT / "docs").rglob("*.md"), NOTEBOOK]:
        made = site / page.relative_to(ROOT).with_suffix("")
        assert (made.parent if page.stem == "README" else made).joinpath("index.html").is_file(), page
    for face in (ROOT / "igae").glob("*/__init__.pyi"):
        room = import_module(f"igae.{face.parent.name}")
        headings = re.findall(r'<h2 id="([\w.]+)"', (site / "api" / face.parent.name / "index.html").read_text())
        documented = [
            f"{room.__name__}.{name}"
            for name in re.findall(r"import (\w+) as", face.read_text())
            if inspect.isroutine(member := getattr(room, name)) or inspect.isclass(member)
            if member.__doc__
        ]
        assert documented and set(documented) <= set(headings)
    for html in (page.read_text(encoding="utf-8") for page in site.rglob("*.html")):
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*>|<link\b[^>]*stylesheet[^>]*>", html)
        assert not [tag for tag in loaded if re.search(r"""(src|href)=["']?(https?:)?//""", tag)]


def test_the_search_finds_settings_and_functions(site: Path) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    for word, page in (("planes.storage", "docs/distributed"), ("load_trained", "api/export")):
        assert any(entry["location"].startswith(page) and word in entry["text"] + entry["title"] for entry in found)


def test_docstrings_are_shown_as_text(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "api" / "export" / "index.html").read_text())
    assert "Normalized latents [B, c, h, w] in [-1, 1]" in shown and not re.search(r":(class|meth|func):", shown)


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with fewer views and steps."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = re.compile(r"(?m)^(VIEWS, WARMUP, JOINT, FIT) = \d+, \d+, \d+, \d+")
    notebook.cells[2].source, changed = settings.subn(r"\1 = 6, 4, 2, 2", notebook.cells[2].source)
    assert changed == 1
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    [folder] = [path for path in tmp_path.iterdir() if (path / "exports").is_dir()]
    assert notebook.cells[2].outputs == []  # imports warn of nothing
    assert (folder / "exports/tiny/igae.json").is_file() and (folder / "outputs/new/metrics.json").is_file()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    assert shown[-1].text.strip() == "True"  # diffusers decodes as igae does
    assert NOTEBOOK.stat().st_size < 300_000
