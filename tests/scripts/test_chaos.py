"""The short form of the chaos run: killed with SIGKILL at random moments, it ends as if nobody had touched it."""
import io
from contextlib import redirect_stdout

from scripts import chaos

from ..processes import spawn


def test_killed_and_resumed_equals_undisturbed():
    """In a process without threads, for it forks."""
    spawn(run, ["--kills", "4", "--epochs", "2", "--seed", "3"], nprocs=1, group=False)


def run(rank, flags):
    with redirect_stdout(io.StringIO()) as out:
        code = chaos.main(flags)
    told = out.getvalue()
    assert code == 0, told
    assert "kills: 4," in told and "survived 4, lost 0" in told
    assert "bit-equal to the undisturbed run: yes" in told
