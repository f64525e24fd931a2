"""The error that a user sees as one line."""


class BundleError(Exception):
    """Error for an unsuitable bundle, option or machine; the message is one line with the remedy."""
