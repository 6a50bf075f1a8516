"""The command group `van-port`. Each command has its own file.

Commands import heavy packages inside their functions, so that `van-port --help` answers at once.
"""

from __future__ import annotations

import errno
import gc
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
from porting.cli.overwriting import refuse_overwriting
from porting.cli.port import port_command, port_options, run_port
from porting.cli.port_all import port_all
from porting.cli.report import report
from porting.cli.revert import revert
from porting.cli.terminal import route_results, say
from porting.errors import INTERRUPTED, OutputError, PortingError
from porting.models.frameworks import postpone_garbage_collection
from porting.run import set_command

_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

EPILOG = """\b
Exit codes: 0 done and at parity; 1 not at parity; 2 wrong usage; 3 bad checkpoint;
4 the tensors are not those of the model, or a map stays open; 5 an input is missing
or cannot be read, or a download fails; 6 cannot write; 7 bad weights file; 8 bad
report; 9 cannot export; 10 Ray is missing or fails; 11 the models cannot be
compared; 130 interrupted.
"""


class PortGroup(click.Group):
    """A group that turns every PortingError into its message, its hint and its exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, and only `--version` and `--help`: the options of a port are in `van-port port --help`."""
        self.format_commands(ctx, formatter)
        shown = [
            param for param in (*self.params, self.get_help_option(ctx)) if param and param.name in {"version", "help"}
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for param in shown if (record := param.get_help_record(ctx)) is not None])
        formatter.write_paragraph()
        formatter.write_text("Without a command, van-port accepts the options of `van-port port`.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:  # the options of a port are explained there
            error.ctx = click.Context(port_command, ctx, "port")
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            refuse_overwriting(ctx)
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
      van-port --variant b1 --out van_b1.h5                # official weights, from the Hugging Face hub
      van-port --variant b1 --checkpoint my.pth.tar        # your own checkpoint
      van-port evaluate --weights van_b1.h5 --data val     # compare both models on a data set
      van-port check --weights van_b1.h5                   # check an existing file
      van-port inspect van_b1.h5                           # show where a file comes from
      van-port map timm:resnet18 models.py:make            # find the key map between any two models
    """
    route_results(to_stderr=False)
    if ctx.invoked_subcommand is not None:
        if model.variant is not None:
            raise click.UsageError(f"give the options of a port after {ctx.invoked_subcommand}, if it accepts them")
        return
    run_port(model, **arguments)


for command in (check, evaluate, export, families, inspect, map_command, port_all, port_command, report, revert):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    set_command(sys.argv[1:])
    postpone_garbage_collection()
    try:
        try:
            cli(prog_name="van-port")
        finally:
            gc.freeze()  # the process ends: what it leaves need not be searched
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # standard output itself failed: commands turn all other OSErrors into PortingErrors
        if error.errno == errno.EPIPE:
            _end_at_a_closed_pipe()
        _forget_stdout()
        say(f"Error: cannot write to standard output: {error.strerror or error}", err=True)
        sys.exit(OutputError.exit_code)


def _end_at_a_closed_pipe() -> NoReturn:
    """Exit silently when the reader of the pipe is gone, as with `| head`."""
    _forget_stdout()
    sys.exit(_BROKEN_PIPE)


def _forget_stdout() -> None:
    """Discard what is still buffered, which Python would otherwise try to write again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
