import pytest

from .runs import register_models, write_local_model


@pytest.fixture(scope="session")
def local_model(tmp_path_factory):
    """Makes the tiny models known here; a folder for `local-dir:`, for other processes."""
    return register_models(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The same with weights."""
    return write_local_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def uncounted(monkeypatch):
    """Fusion models are trained without the count of operations, which takes longer than the rest of a tiny run."""
    from training.tasks.counted import CountedTask

    monkeypatch.setattr(CountedTask, "cost", lambda self, batch: None)
