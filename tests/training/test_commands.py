"""The console command."""
from __future__ import annotations

from pathlib import Path

import pytest

from training.__main__ import COMMANDS, main


def test_it_hands_the_words_on_to_the_command(capsys):
    assert main(["zero-shot", "--templtes", "simple"]) == 2
    assert capsys.readouterr().err == "error: Unknown option --templtes; did you mean --templates?\n"
    assert main(["count-shards", "no/such/folder"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_page(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and COMMANDS[name][0].removesuffix(".command") in capsys.readouterr().out


def test_without_a_command_it_lists_them_and_an_unknown_one_is_one_sentence(capsys):
    assert main([]) == main(["--help"]) == 0
    listed = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
    assert all(f"  {name} " in listed and f"\n| `{name}` | `" in page for name in COMMANDS)
    assert main(["fine-tune"]) == 2
    assert capsys.readouterr().err == "error: There is no command 'fine-tune'; did you mean finetune?\n"
    assert main(["7"]) == 2
    assert "there are train, finetune" in capsys.readouterr().err
