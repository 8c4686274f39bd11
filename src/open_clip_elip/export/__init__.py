"""Models in the forms of other programs, each checked on the spot against the model that it was made of."""


class ExportError(ValueError):
    """Something a person can mend; the message is one sentence that says what is wrong and what to do."""
