"""What token reduction keeps of pictures, to be seen: `python -m open_clip_elip.visualize --help`."""


class VisualizeError(ValueError):
    """Something a person can mend; the message is one sentence that says what is wrong and what to do."""
