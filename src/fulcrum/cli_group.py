"""Where every error of the command line ends.

One that a user can mend is one line on stderr and exit code 2; any other is a bug of ours: a line that says so and exit code 1.
With `--debug` the traceback stands before the line. Ctrl-C is exit code 130, SIGTERM 143.
"""

import signal
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from fulcrum import stopping
from fulcrum.errors import FulcrumError

DEBUG = "--debug"
_RESUMED = "what was finished is kept; go on with --resume"
_KEPT = {  # what is said after Ctrl-C
    "train": _RESUMED,
    "compare": _RESUMED,
    "scale": _RESUMED,
    "quanta": _RESUMED,
    "pool": "what was converted is kept; the same command goes on with it",
    "anchor": "what was scored is kept; the same command goes on with it",
    "selfgen": "what was made is kept; the same command goes on with it",
}


class Group(TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept `--debug` after the verb too: that is where people add it."""
        return super().parse_args(ctx, [DEBUG] * (DEBUG in args) + [arg for arg in args if arg != DEBUG])

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; turn what a user can mend into one line."""
        stopping.at_once()
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
        except KeyboardInterrupt as error:
            from fulcrum import terminal

            kept = _KEPT.get(ctx.invoked_subcommand or "", "nothing was changed")
            terminal.fail(kept, "stopped")
            raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):  # Typer's own, which it prints
                raise
            from fulcrum import terminal

            where = "" if ctx.params["debug"] else "; --debug shows where"
            if ctx.params["debug"]:
                traceback.print_exc()
            terminal.fail(f"a fault of Fulcrum itself: {type(error).__name__}: {error}{where}")
            raise typer.Exit(1) from None
