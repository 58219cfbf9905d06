"""The error of which programs show the message alone."""


class UserError(Exception):
    """Mistake in what the user gave; the message says what is wrong, where, and what to do.

    Scripts print the message without a stack and exit with 1. A subclass exists only where code
    catches it apart from the others.
    """
