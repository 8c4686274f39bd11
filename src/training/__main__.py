"""All commands under one name: open-clip-elip COMMAND ... (or python -m training); COMMAND --help tells its options."""
from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from .errors import EXIT_USER_ERROR
from .launch import end

# Modules with a `main` of an argv that returns the exit code, and what they do.
COMMANDS = {
    "train": ("training.main", "pre-train CLIP, ALBEF, BLIP or METER"),
    "finetune": ("training.finetune", "fine-tune an image tower for classification"),
    "downstream": ("training.downstream", "train and evaluate a fusion model on what comes after pre-training"),
    "zero-shot": ("training.zero_shot", "classify by prompts"),
    "probe": ("training.linear_probe", "linear probe on frozen features"),
    "retrieval": ("training.retrieval", "image-text retrieval"),
    "caption": ("training.caption", "write captions with a BLIP model"),
    "count-shards": ("training.count_shards", "note how many samples shards hold"),
    "summary": ("training.summary", "draw the curves of a run"),
    "visualize": ("open_clip_elip.visualize.command", "see which patches a model keeps"),
    "export": ("open_clip_elip.export.command", "write a model for other programs"),
    "profile": ("open_clip_elip.profile.command", "what models cost in training, side by side"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code, or 2 after one sentence on stderr."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__ + "\n")
        print("\n".join(f"  {known:14}{about}" for known, (_, about) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"error: There is no command {name!r}; {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    return importlib.import_module(COMMANDS[name][0]).main(words)


def console() -> None:
    end(main())


if __name__ == "__main__":
    console()
