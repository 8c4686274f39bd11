"""The documentation names only flags, modules, pages, models and sentences that there are; its notebook runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*.ipynb"))]
OF_OTHERS = {"--standalone", "--nodes", "--gpus-per-node", "--time", "--x", "--no-x", "--batch"}  # torchrun's, SLURM's
OF_OTHERS |= {"--sort"}  # tar's
IN_RUNS = {"config.yaml"}


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def text_of(page: Path) -> str:
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def words() -> set[str]:
    """All names in the code, with underscores."""
    files = [file for folder in ("src", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.*")]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".sh", ".sbatch"))
    return {word.replace("-", "_").removeprefix("no_") for word in re.findall(r"[a-z][\w-]*", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_flags_and_files_are_there(page, words):
    text = text_of(page)
    text = re.sub(r"download\(\) \{.*?\n\}", "", text, flags=re.DOTALL)  # img2dataset's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])", text)) - OF_OTHERS:
        assert flag[2:].replace("-", "_").removeprefix("no_") in words, flag
    for link, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for name in set(re.findall(r"`([\w./-]+\.(?:py|sh|yaml|sbatch))`", text)) - IN_RUNS:
        assert "NAME" in name or (ROOT / name).exists() or list(ROOT.glob(f"*/**/{name}")), name
    for module in set(re.findall(r"-m ((?:training|open_clip_elip)[\w.]*)", text)):
        place = ROOT / "src" / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(block, page.name, "exec")


def test_lists_are_complete():
    index, models = (DOCS / "README.md").read_text(), (DOCS / "models.md").read_text()
    for page in {*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")} - {DOCS / "README.md"}:
        assert f"]({page.name})" in index, page.name
    extras = (ROOT / "setup.py").read_text().partition("extras_require")[2].partition("entry_points")[0]
    for extra in re.findall(r'"(\w+)": \[', extras):
        assert f"| `{extra}` |" in index, extra
    for config in (ROOT / "src" / "open_clip_elip" / "model_configs").glob("*.json"):
        assert f"| `{config.stem}` |" in models, config.stem


def test_sentences_of_troubleshooting_are_those_of_the_program():
    code = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)  # a string in two lines
    sentences = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(sentences) > 40
    for sentence in sentences:
        for part in sentence.split("..."):
            assert part.strip() in code, sentence


def test_the_tour_runs_and_learns():
    found = {}
    for cell in code_cells(DOCS / "tour.ipynb"):
        exec(cell.replace("range(30)", "range(12)"), found)  # enough to learn something, in a third of the time
    assert len(found["losses"]) == 12 and min(found["losses"]) < found["losses"][0] - 0.5
    assert (DOCS / "tour.ipynb").stat().st_size < 100_000
