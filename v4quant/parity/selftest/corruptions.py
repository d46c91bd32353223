"""Every corruption that `v4quant selftest` plants, by name.

A new one is a line in one of the modules named here; tests hold it to applying cleanly and to its place in the table of
what inspect and verify catch.
"""

from v4quant.parity.selftest import layout, scales, settings, structure, values
from v4quant.parity.selftest.corruption import Corruption

CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for module in (structure, scales, values, layout, settings)
    for corruption in module.CORRUPTIONS
}
