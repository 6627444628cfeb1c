"""What can go wrong with a model, in words a user can act on. Free of torch: the command line imports it."""


class ModelError(Exception):
    """A model is unknown, not downloaded, damaged, or cannot do what was asked. The message names the way out."""


class NotEnoughMemory(ModelError):
    """A model does not fit beside what is in memory now."""
