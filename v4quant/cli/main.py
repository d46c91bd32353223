"""The `v4quant` command: one verb a module, and the map from errors to messages and exit codes.

Commands import what they need when they run, so that `v4quant --help` is instant.
"""

import io
import os
import sys
import traceback
from typing import Annotated

import typer

import v4quant
from v4quant.checkpoint.process_group import EndedElsewhereError
from v4quant.cli import (
    budget,
    convert,
    decode,
    demo,
    download,
    encode,
    generate,
    inspect_,
    merge,
    parity,
    push,
    reference,
    selftest,
    shard,
    synth,
    verify,
)
from v4quant.cli._output import escaped
from v4quant.errors import InterruptedRunError, OutputError, V4QuantError
from v4quant.words import without_secrets

app = typer.Typer(
    name="v4quant",
    help="Convert DeepSeek-V4 checkpoints and prove the result.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS = (
    *(inspect_.inspect, budget.budget, download.download, synth.synth, convert.convert, verify.verify),
    *(shard.shard, merge.merge, reference.reference, parity.parity, push.push, selftest.selftest),
    *(encode.encode, decode.decode, generate.generate, demo.demo),
)
for command in _COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"v4quant {v4quant.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert DeepSeek-V4 checkpoints and prove the result."""


def main(argv: list[str]) -> int:
    """Run one command line and return its exit code (DESIGN: 0, 1, 2, 3, 4, 5 or 130)."""
    try:
        try:
            app(args=argv, prog_name="v4quant")
        finally:
            sys.stdout.flush()
    except SystemExit as exit_:
        if exit_.code == InterruptedRunError.exit_code:  # typer's answer to Ctrl-C, without a word
            _report(InterruptedRunError("interrupted"))
        return exit_.code if isinstance(exit_.code, int) else 0
    except EndedElsewhereError as error:  # the process that has failed says why
        return error.exit_code
    except V4QuantError as error:
        _report(error)
        return error.exit_code
    except OSError as error:  # the library turns its own into errors with a place and a hint
        _report(OutputError(f"cannot write the result: {error.strerror or error}"))
        return OutputError.exit_code
    except KeyboardInterrupt:
        _report(InterruptedRunError("interrupted"))
        return InterruptedRunError.exit_code
    return 0


def _report(error: V4QuantError) -> None:
    if os.environ.get("V4QUANT_DEBUG") == "1":
        # What a server said stands in the chain of causes, and may echo a token.
        print(escaped(without_secrets(traceback.format_exc())), file=sys.stderr, end="")
    print(f"error: {escaped(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {escaped(error.hint)}", file=sys.stderr)


def run() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without our characters is no reason to fail
    try:
        code = main(sys.argv[1:])
    except Exception:  # a fault of ours, shown as one
        print(escaped(without_secrets(traceback.format_exc())), file=sys.stderr, end="")
        code = V4QuantError.exit_code
    sys.exit(code)
