"""Where every error of the command line ends.

One that a user can mend is one line on stderr and exit code 2; with `--debug` its traceback stands before it. Ctrl-C is exit
code 130. Any other exception is a bug of ours and keeps its traceback.
"""

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from fulcrum.errors import FulcrumError

DEBUG = "--debug"


class Group(TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept `--debug` after the verb too: that is where people add it."""
        return super().parse_args(ctx, [DEBUG] * (DEBUG in args) + [arg for arg in args if arg != DEBUG])

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; turn what a user can mend into one line."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (FulcrumError, OSError) as error:
            from fulcrum import terminal

            if ctx.params["debug"]:
                traceback.print_exc()
            terminal.fail(terminal.explain(error) if isinstance(error, OSError) else str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            from fulcrum import terminal

            kept = ctx.invoked_subcommand in ("train", "compare")
            terminal.fail("what was finished is kept; go on with --resume" if kept else "nothing was changed", "stopped")
            raise typer.Exit(130) from None
