"""What models cost in training: parameters, operations, tokens, time, memory; `python -m open_clip_elip.profile`."""
from ..errors import ModelError


class ProfileError(ModelError):
    """Something a person can mend; the message is one sentence that says what is wrong and what to do."""
