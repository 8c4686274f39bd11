"""What a person can mend. Imports nothing, so that commands can tell it before torch is there."""


class ModelError(ValueError):
    """A model, weights or files that cannot be had, or options that do not fit; the message is one sentence that says
    what is wrong and what to do."""
