"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in the input, or a condition that its owner can mend.

    The message has at most three lines: which thing, what was given, and what is allowed or the way out. The commands
    print it without a traceback and end with exit status 2.
    """
