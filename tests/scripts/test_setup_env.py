"""The environment of the scripts has all that they look for, so that they set it up once."""
import re
from importlib.metadata import requires
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_env.sh"


def test_every_package_that_is_looked_for_is_installed():
    installed = re.search(r"-e '\.\[([\w,]+)\]'", SCRIPT.read_text())[1].split(",")
    looked_for, brought = set(), set()
    for requirement in requires("open_clip_elip"):
        name, extra = re.match(r"[\w.-]+", requirement)[0], re.search(r'extra == "(\w+)"', requirement)
        looked_for.add(name)
        if extra is None or extra[1] in installed:
            brought.add(name)
    assert len(looked_for) > 10 and looked_for == brought
