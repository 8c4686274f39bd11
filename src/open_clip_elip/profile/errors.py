"""The one error that is for the person at the keyboard."""
from __future__ import annotations


class ProfileError(Exception):
    """Something a person can mend; the message is one sentence that says what is wrong and what to do."""
