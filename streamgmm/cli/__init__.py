"""The ``streamgmm`` command."""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

import click

from streamgmm._version import __version__
from streamgmm.cli.commands import Commands
from streamgmm.cli.deadline import Deadline
from streamgmm.errors import Interrupted, Reported, RequestError, StreamGMMError


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="streamgmm")
@click.option("--debug", is_flag=True, help="Show tracebacks and library warnings.")
def cli(debug: bool) -> None:
    """Gaussian mixtures on more vectors than memory holds."""
    if not debug:
        warnings.simplefilter("ignore")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 request or data wrong, 1 anything else, 128+n on signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # Wherever it stands: who adds it to a command that failed adds it at the end.
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "×" or "…" must not end a run.
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    deadline = Deadline()
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        cli.main(arguments, prog_name="streamgmm", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, (Interrupted, KeyboardInterrupt, click.ClickException)):
            raise
        message, status = _last_words(error)
        if _told_elsewhere(error):
            sys.exit(status)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        deadline.told = True
        print(f"streamgmm: error: {_one_line(message)}", file=sys.stderr)
        sys.exit(status)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        deadline.close()
    sys.exit(0)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End in order, so that half-written results are removed; `fit` saves a checkpoint in a way of its own."""
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number, f"stopped by {signal.Signals(number).name}")


def _told_elsewhere(error: BaseException) -> bool:
    """Whether another of several processes tells the user; what is wrong with the arguments of all, the first tells."""
    if not isinstance(error, click.ClickException):
        return isinstance(error, Reported)
    from streamgmm.processes import launched  # which imports torch

    try:
        return launched()[0] > 0
    except RequestError:
        return False


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to tell a person about ``error``, and the exit status."""
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "stopped at once by SIGINT; what was saved before is intact", 128 + signal.SIGINT
    if isinstance(error, StreamGMMError):
        return str(error), error.exit_status
    if isinstance(error, MemoryError) or _is_device_memory(error) or "can't allocate memory" in str(error):
        what = _one_line(str(error)).split(". ")[0] or "no more memory"
        return f"out of memory ({what}); lower --memory or --chunk-rows, and run the same command again", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'device'}: {error.strerror}; mend that and run the same command again", 1
    return f"{type(error).__name__}: {error}; run again with --debug for the place", 1


def _is_device_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # no error of its own before it is imported
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _one_line(message: str) -> str:
    """``message`` without line breaks, and without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
