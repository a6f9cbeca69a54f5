"""Errors a user can cause and can fix."""


class UserError(ValueError):
    """A mistake in input, configuration or environment.

    The message is one line that names the file, the key and the fix; the command line prints it without a traceback
    and exits with code 2.
    """
