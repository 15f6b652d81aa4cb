"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake of the user's: what was wrong, the rule, the remedy, in one line.

    The command line prints it as `error: ...` and exits with code 2; library callers
    see a `ValueError`.
    """


class TrainingDiverged(FloatingPointError):
    """Training met a number that is not finite.

    The message names the step and the last good checkpoint, which is left as it was.
    The command line prints it as `error: ...` and exits with code 3.
    """
