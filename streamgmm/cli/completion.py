"""``streamgmm completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from streamgmm.cli.options import as_json, print_result

_SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog='Example: streamgmm completion bash. For this terminal alone: eval "$(streamgmm completion bash)".',
    short_help="Print the script that completes streamgmm's commands, options and file names.",
)
@click.argument("shell", type=click.Choice(_SHELLS))
@as_json
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print the script with which SHELL completes commands, options and file names of streamgmm.

    To install it for every new terminal:

    \b
      bash   streamgmm completion bash > ~/.local/share/bash-completion/completions/streamgmm
      zsh    streamgmm completion zsh > ~/.streamgmm-completion.zsh
             echo '. ~/.streamgmm-completion.zsh' >> ~/.zshrc
      fish   streamgmm completion fish > ~/.config/fish/completions/streamgmm.fish
    """
    root = context.find_root()
    generator = get_completion_class(shell)
    assert generator is not None
    script = generator(root.command, {}, "streamgmm", "_STREAMGMM_COMPLETE").source()
    print_result({"shell": shell, "script": script}, [script], as_json=as_json)
