"""What a person can mend is told in one sentence, never as a traceback."""


class UserError(Exception):
    """Bad input, in one clear sentence: what is wrong and what to do about it. Commands print it and end with 2.

    Ranks send each other errors: a subclass must be able to do with a message alone; its attributes travel along.
    """


class Stopped(BaseException):  # no `except Exception` of a library is to catch it
    """The run ended early, in order and with its state saved; `code` is the exit code of the process."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


EXIT_USER_ERROR = 2


def reason(error: BaseException) -> str:
    """What another library's error says, short enough for a sentence."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
