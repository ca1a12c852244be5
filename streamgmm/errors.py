"""What can go wrong, as one small tree.

::

    StreamGMMError                 exit status 1, unless a branch below says otherwise
    ├── RequestError (ValueError)  2: a parameter cannot be met; names parameter, value and remedy
    │   ├── DataError              2: the data is missing, malformed, non-finite or inconsistent
    │   └── RunError               2: a RUN folder belongs to other data or other settings, or is in use
    ├── DamagedFileError           2: a model or checkpoint fails its checksum
    ├── NumericalError             1: no finite result in the widest precision
    ├── Interrupted                128 + signal: a checkpoint was written first
    ├── PeerLost                   1: another process of the same run is gone
    └── Reported                   as told: another process of the same run tells the user why it ends

Every message is one line: what was wrong, the value, and what to do about it.
"""

from __future__ import annotations


class StreamGMMError(Exception):
    """Base of everything this package raises on purpose."""

    exit_status = 1


class RequestError(StreamGMMError, ValueError):
    """A parameter, or a combination of parameters, that cannot be met."""

    exit_status = 2


class DataError(RequestError):
    """Data that cannot be used as it is: the message names the file, the place and the remedy."""


class RunError(RequestError):
    """A RUN folder that cannot be used for this request."""


class DamagedFileError(StreamGMMError):
    """A file whose checksum does not match its contents."""

    exit_status = 2


class NumericalError(StreamGMMError):
    """No finite result, even in fp64."""


class Interrupted(StreamGMMError):
    """The run was asked to stop by a signal, and its state was saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class PeerLost(StreamGMMError):
    """Another process of the same run ended without a word, or cannot be reached."""


class Reported(StreamGMMError):
    """The run ends for a reason that another of its processes tells the user."""

    def __init__(self, exit_status: int) -> None:
        super().__init__("another process of this run tells why it ends")
        self.exit_status = exit_status
