"""What a person can mend is told in one sentence, never as a traceback."""


class UserError(Exception):
    """Bad input. The message is one clear sentence: what is wrong and what to do about it.

    `training.main` prints the message and exits with `EXIT_USER_ERROR` on every rank.
    """


EXIT_USER_ERROR = 2
