"""The ``streamgmm`` command: a file a subcommand."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import click

from streamgmm._version import __version__
from streamgmm.cli.demo import demo
from streamgmm.cli.fit import fit
from streamgmm.cli.info import info
from streamgmm.cli.predict import predict
from streamgmm.cli.score import score
from streamgmm.errors import StreamGMMError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    try:
        cli.main(arguments, prog_name="streamgmm", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        if error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped at once by SIGINT; the last checkpoint is intact", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, StreamGMMError):
            _fail(str(error), error.exit_status)
        if isinstance(error, OSError) and error.strerror:
            _fail(f"{error.filename or 'device'}: {error.strerror}", 1)
        _fail(f"{type(error).__name__}: {error}; run again with --debug for the place", 1)
    sys.exit(0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"streamgmm: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
