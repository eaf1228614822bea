"""The one exception a user sees."""


class SpringtideError(Exception):
    """A mistake in what the user asked for or gave; the message is one sentence that says what to do."""
