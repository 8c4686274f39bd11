import pytest

from open_clip_elip.adapters import KINDS


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Of adapters."""
    if request.param == "lora":
        pytest.importorskip("peft")
    return request.param
