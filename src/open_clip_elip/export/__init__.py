"""Models in the forms of other programs, each checked on the spot against the model that it was made of."""
