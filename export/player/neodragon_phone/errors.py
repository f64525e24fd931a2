"""The error that a user sees as one line."""


class BundleError(Exception):
    """A bundle, an option or the machine is not what a run needs; the message is one line with the remedy."""
