"""The documentation names only flags, modules and pages that there are."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = {"--standalone", "--nodes", "--gpus-per-node", "--time", "--x", "--no-x", "--batch"}  # torchrun's, SLURM's
IN_RUNS = {"config.yaml"}


@pytest.fixture(scope="module")
def words() -> set[str]:
    """All names in the code, with underscores."""
    files = [file for folder in ("src", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.*")]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".sh", ".sbatch"))
    return {word.replace("-", "_").removeprefix("no_") for word in re.findall(r"[a-z][\w-]*", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_and_files_are_there(page, words):
    text = page.read_text()
    text = re.sub(r"download\(\) \{.*?\n\}", "", text, flags=re.DOTALL)  # img2dataset's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])", text)) - OF_OTHERS:
        assert flag[2:].replace("-", "_").removeprefix("no_") in words, flag
    for link in re.findall(r"\]\(([\w./-]+)[)#]", text):
        assert (page.parent / link).exists(), link
    for name in set(re.findall(r"`([\w./-]+\.(?:py|sh|yaml|sbatch))`", text)) - IN_RUNS:
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/**/{name}")), name
