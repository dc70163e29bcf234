"""The two ways in which a run ends other than by the command's own exit."""

HOST_FAILED = 125
TIMED_OUT = 124


class HostError(Exception):
    """The host cannot be had, or is gone: exit status 125, as of env(1) and timeout(1)."""


class Interrupted(BaseException):
    """A signal told the runner to end."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number
