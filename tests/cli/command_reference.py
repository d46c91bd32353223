"""Print docs/cli.md: the help of every command, exactly as the command line gives it."""

import contextlib
import io
import os

from v4quant.cli.main import app, main

_HEAD = """\
# Commands

Made from the commands' own help by `make docs`; a test fails when it is out of date.

Results go to stdout, everything else to stderr; with `--json` stdout is exactly one JSON object.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check ran and failed: a mismatch, a rounding not allowed, a verdict `different`, a malformed completion |
| 2 | usage, or a config.json that v4quant does not support |
| 3 | bad or missing checkpoint data |
| 4 | Hub, network or account; another process of the same job died or cannot be reached |
| 5 | disk or output folder |
| 130 | interrupted; the same command continues |

| environment variable | meaning |
|---|---|
| `V4QUANT_DEBUG=1` | a traceback instead of a one-line error |
| `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_HUB_DISABLE_XET` | as huggingface_hub has them |
| `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` | set by torchrun: see [scale-out.md](scale-out.md) |
"""


def help_of(*arguments: str) -> str:
    """What `v4quant ARGUMENTS --help` prints, at a fixed width."""
    printed = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(printed):
        assert main([*arguments, "--help"]) == 0
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def command_reference() -> str:
    """The whole of docs/cli.md."""
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    parts = [f"## v4quant {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands]
    return "\n".join([_HEAD, *parts])


if __name__ == "__main__":
    print(command_reference(), end="")
