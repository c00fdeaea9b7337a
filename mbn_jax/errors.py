"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Bad input: the message says what was expected, what came and what to do.

    Command lines print it as one sentence, without a traceback.
    """
