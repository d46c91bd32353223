"""`python -m v4quant`: the same as the `v4quant` command."""

from v4quant.cli.main import run

run()
