"""The ``streamgmm`` command: a file a subcommand."""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

import click

from streamgmm._version import __version__
from streamgmm.cli.demo import demo
from streamgmm.cli.fit import fit
from streamgmm.cli.info import info
from streamgmm.cli.predict import predict
from streamgmm.cli.score import score
from streamgmm.errors import Interrupted, StreamGMMError


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="streamgmm")
@click.option("--debug", is_flag=True, help="Show tracebacks and library warnings.")
def cli(debug: bool) -> None:
    """Gaussian mixtures on more vectors than memory holds."""
    if not debug:
        warnings.simplefilter("ignore")


for command in (demo, fit, info, predict, score):
    cli.add_command(command)


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
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        cli.main(arguments, prog_name="streamgmm", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        if error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped at once by SIGINT; what was saved before is intact", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, StreamGMMError):
            _fail(str(error), error.exit_status)
        if isinstance(error, OSError) and error.strerror:
            _fail(f"{error.filename or 'device'}: {error.strerror}; mend that and run the same command again", 1)
        _fail(f"{type(error).__name__}: {error}; run again with --debug for the place", 1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    sys.exit(0)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End in order, so that half-written results are removed; `fit` saves a checkpoint in a way of its own."""
    raise Interrupted(number, f"stopped by {signal.Signals(number).name}")


def _fail(message: str, status: int) -> NoReturn:
    print(f"streamgmm: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
