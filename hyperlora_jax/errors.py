"""The one exception for what a user can put right: bad files, arguments, configs."""


class UserError(Exception):
    """Bad input. The message is one line: the file or argument, what was found, what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
