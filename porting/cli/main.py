"""`van-port`: the group of commands, each in a file of its own.

Everything heavy is imported inside the commands: `van-port --help` must answer at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, NoReturn

import click

from porting.cli.check import check
from porting.cli.evaluate import evaluate
from porting.cli.export import export
from porting.cli.families import families
from porting.cli.groups import Model
from porting.cli.inspect import inspect
from porting.cli.map import map_command
from porting.cli.port import port_command, port_options, run_port
from porting.cli.port_all import port_all
from porting.cli.report import report
from porting.cli.revert import revert
from porting.cli.terminal import route_results, say
from porting.errors import INTERRUPTED, OutputError, PortingError

_BROKEN_PIPE = 141  # as a shell says of a program that SIGPIPE ends

EPILOG = """\b
Exit codes: 0 done and at parity; 1 not at parity; 2 wrong usage; 3 bad checkpoint;
4 tensors do not fit the model; 5 file not found; 6 cannot write; 7 bad weights file;
8 bad report; 9 cannot export; 10 the engine of an evaluation fails; 130 interrupted.
"""


class PortGroup(click.Group):
    """A group that ends every error of the user's in its message, its hint and its exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands alone: `van-port port --help` shows what the bare command takes as well."""
        self.format_commands(ctx, formatter)
        shown = [
            param for param in (*self.params, self.get_help_option(ctx)) if param and param.name in {"version", "help"}
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for param in shown if (record := param.get_help_record(ctx)) is not None])
        formatter.write_paragraph()
        formatter.write_text("Without a command, van-port takes the options of `van-port port`.")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PortingError as error:
            say(f"Error: {error.message}", err=True, colour="red")
            if error.hint:
                say(error.hint, err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            _end_at_a_closed_pipe()
        except KeyboardInterrupt:
            say("Interrupted; nothing was written.", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=PortGroup, invoke_without_command=True, no_args_is_help=True, epilog=EPILOG)
@click.version_option(package_name="van-port", prog_name="van-port")
@port_options
@click.pass_context
def cli(ctx: click.Context, /, model: Model, **arguments: Any) -> None:
    """Port trained weights from PyTorch to Keras, and prove that nothing was lost.

    \b
      van-port --variant nano                              # the embedded checkpoint
      van-port --variant b1 --out van_b1.h5                # official weights, from the hub
      van-port --variant b1 --checkpoint my.pth.tar        # your own
      van-port evaluate --weights van_b1.h5 --data val     # both models over a data set
      van-port check --weights van_b1.h5                   # a file made earlier or elsewhere
      van-port inspect van_b1.h5                           # where a file comes from
      van-port map timm:resnet18 models.py:make            # the key map between any two models
    """
    route_results(to_stderr=False)
    if ctx.invoked_subcommand is not None:
        if model.variant is not None:
            raise click.UsageError(f"the options of a port go after {ctx.invoked_subcommand}, where it has them")
        return
    run_port(model, **arguments)


for command in (check, evaluate, export, families, inspect, map_command, port_all, port_command, report, revert):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end the program
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            cli(prog_name="van-port")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # all others have become errors of ours; this one is of standard output itself
        if error.errno == errno.EPIPE:
            _end_at_a_closed_pipe()
        _forget_stdout()
        say(f"Error: standard output cannot be written: {error.strerror or error}", err=True)
        sys.exit(OutputError.exit_code)


def _end_at_a_closed_pipe() -> NoReturn:
    """As of `| head`: nobody reads, so nothing is said."""
    _forget_stdout()
    sys.exit(_BROKEN_PIPE)


def _forget_stdout() -> None:
    """What is still buffered could not be written at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
