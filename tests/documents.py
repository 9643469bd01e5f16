# SPDX-License-Identifier: Apache-2.0
"""What the documents say: their blocks, commands, links and keys."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = (
    "igae python python3 pip make accelerate torchrun pytest ruff mypy sbatch squeue scancel srun docker kubectl ssh "
    "scp rsync hf git cd export curl wget sh bash source apt-get tensorboard wandb aws gsutil gcloud nvidia-smi "
    "mkdocs mike .ci/run"
).split()
ASSIGNMENTS = re.compile(r"""([A-Z][A-Z0-9_]*=("[^"]*"|'[^']*'|\S*)\s*)*""")


@dataclass(frozen=True)
class Block:
    """Code, indented by four spaces or fenced; or the text between."""

    document: str
    language: str
    """Of the fence; else found by its content: `sh`, `python` or nothing. `text` is what is no code."""
    text: str

    @property
    def spans(self) -> list[str]:
        """What stands `like this` in running text."""
        found = re.findall(r"(?<!`)`([^`]+)`(?!`)", self.text) if self.language == "text" else []
        return [" ".join(span.split()) for span in found]


def blocks(path: Path) -> Iterator[Block]:
    """All of a page, in its order."""
    name, lines, kind = str(path.relative_to(ROOT)), list[str](), "text"

    def piece() -> Iterator[Block]:
        text = "\n".join(lines).strip("\n")
        lines.clear()
        if text:
            yield Block(name, kind or _language(text), text)

    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        if fence:
            fenced = not fenced
        code = "" if line.startswith("    ") or (not line and kind == "") else "text"
        if fence or (not fenced and code != kind):
            yield from piece()
            kind = line[3:].strip() if fence and fenced else "text" if fence else code
        if not fence:
            lines.append(line[4:] if kind == "" and not fenced else line)
    yield from piece()


def _language(text: str) -> str:
    if re.match(r"(import|from) \w", text):
        return "python"
    return "sh" if any(_is_command(line) for line in text.splitlines()) else ""


def _is_command(line: str) -> bool:
    words = line[ASSIGNMENTS.match(line).end() :].split()  # type: ignore[union-attr]
    return bool(words) and words[0].removeprefix(".venv/bin/") in PROGRAMS


def steps(path: Path) -> list[tuple[str, str]]:
    """All commands in the order of the page, one line each: those of shell blocks, each with what the lines that begin
    with `#` below it say that it prints, and those in running text that have arguments."""
    found = list[tuple[str, str]]()
    for block in blocks(path):
        if block.language == "sh":
            for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
                if line.startswith("# "):
                    found[-1] = (found[-1][0], f"{found[-1][1]}\n{line[2:]}".strip())
                elif command := re.sub(r"\s+# .*", "", line).strip():
                    found.append((command, ""))
        for span in block.spans:
            if (_is_command(span) and " " in span and span != "accelerate launch") or span == ".ci/run":
                found.append((span, ""))
    return found


def commands(path: Path) -> list[str]:
    """All commands of a page, each once."""
    return list(dict.fromkeys(command for command, _ in steps(path)))


def spans(path: Path) -> list[str]:
    """What stands `like this` in running text."""
    return [span for block in blocks(path) for span in block.spans]


def links(path: Path) -> set[str]:
    return set(re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
