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
    "scp rsync hf git cd export curl wget sh bash source apt-get tensorboard wandb aws gsutil gcloud nvidia-smi .ci/run"
).split()
ASSIGNMENTS = re.compile(r"""([A-Z][A-Z0-9_]*=("[^"]*"|'[^']*'|\S*)\s*)*""")


@dataclass(frozen=True)
class Block:
    """Indented by four spaces, or fenced."""

    document: str
    language: str
    """Of the fence; else found by its content: `sh`, `python` or nothing."""
    text: str


def blocks(path: Path) -> Iterator[Block]:
    name, lines, fence = str(path.relative_to(ROOT)), [], None

    def block(language: str) -> Iterator[Block]:
        text = "\n".join(lines).strip("\n")
        lines.clear()
        if text:
            yield Block(name, language or _language(text), text)

    for line in [*path.read_text(encoding="utf-8").splitlines(), "end"]:
        if line.startswith("```"):
            yield from block(fence or "")
            fence = line[3:].strip() if fence is None else None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("    ") or (not line and lines):
            lines.append(line[4:])
        else:
            yield from block("")


def _language(text: str) -> str:
    if re.match(r"(import|from) \w", text):
        return "python"
    return "sh" if any(_is_command(line) for line in text.splitlines()) else ""


def _is_command(line: str) -> bool:
    words = line[ASSIGNMENTS.match(line).end() :].split()  # type: ignore[union-attr]
    return bool(words) and words[0].removeprefix(".venv/bin/") in PROGRAMS


def commands(path: Path) -> set[str]:
    """All commands of shell blocks, one line each, and those in running text that have arguments."""
    found = set()
    for block in blocks(path):
        if block.language == "sh":
            text = re.sub(r"\s*\\\n\s*", " ", block.text)
            found |= {re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()}
    for span in spans(path):
        if (_is_command(span) and " " in span and span != "accelerate launch") or span == ".ci/run":
            found.add(span)
    return found - {""}


def spans(path: Path) -> list[str]:
    """What stands `like this` in running text."""
    lines, fenced = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith("    "):
            lines.append(line)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", "\n".join(lines))]


def links(path: Path) -> set[str]:
    return set(re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
