"""The plot of `v4quant budget`: cache and work of a token against context length, beside V3.2 and GQA-8."""

from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from v4quant.budget import baselines, flops, kv_cache
from v4quant.config import V4Config
from v4quant.errors import OutputError

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
# Colours differ in lightness and lines in dashes, so that nothing is lost in black and white.
_V4, _V32, _GQA8 = ("#0b62a4", "solid"), ("#d98200", (0, (5, 2))), ("#5b6570", (0, (1, 1.5)))
_SHORTEST = 1024


def write_plot(path: Path, config: V4Config, release: str, context: int) -> None:
    """Draw both panels into a file, whose suffix says the kind.

    Args:
        path: *.png, *.svg or *.pdf.
        release: what to call the model.
        context: where to put a mark.

    Raises:
        OutputError: if the file cannot be written.
    """
    with matplotlib.style.context(["default", _STYLE]):
        figure = draw(config, release, context)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror or error}") from None


def draw(config: V4Config, release: str, context: int) -> Figure:
    """The figure: bytes of one sequence's cache, and FLOPs of a decode step, both on log axes."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = _lengths(config, context)
    served = kv_cache.served_layout(config)
    layers = f"GQA-8, BF16, {config.num_hidden_layers} layers"
    _line(left, lengths, [kv_cache.kv_bytes(config, n, served) for n in lengths], _V4, release)
    _line(left, lengths, [baselines.v32_kv_bytes(n) for n in lengths], _V32, "DeepSeek-V3.2")
    _line(left, lengths, [baselines.gqa8_kv_bytes(config, n) for n in lengths], _GQA8, layers)
    decode = [flops.decode_flops(config, n) for n in lengths]
    _line(right, lengths, [sum(parts.values()) for parts in decode], _V4, release)
    v32 = [sum(baselines.v32_decode_flops(n).values()) for n in lengths]
    _line(right, lengths, v32, _V32, "DeepSeek-V3.2")
    attention = ("core_attention", "indexer_scores")
    dense = [
        baselines.gqa8_decode_flops(config, n, sum(count for part, count in parts.items() if part not in attention))
        for n, parts in zip(lengths, decode, strict=True)
    ]
    _line(right, lengths, dense, _GQA8, f"{release} with GQA-8 over all tokens")
    _finish(left, "KV cache of one sequence", _bytes_label, context)
    _finish(right, "FLOPs of one decode step", _flops_label, context)
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # under two decades
    return figure


def _lengths(config: V4Config, context: int) -> list[int]:
    """Powers of two up to what the model takes, with the marked length among them."""
    longest = config.max_position_embeddings
    steps = {min(_SHORTEST, longest), context, longest}
    length = _SHORTEST
    while length < longest:
        steps.add(length)
        length *= 2
    return sorted(steps)


def _line(
    axes: Axes, lengths: list[int], values: list[float] | list[int], look: tuple[str, object], label: str
) -> None:
    colour, dashes = look
    axes.plot(lengths, values, color=colour, linestyle=dashes, linewidth=1.8, label=label)


def _finish(axes: Axes, title: str, label: FuncFormatter, context: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("context, tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: tokens(round(n))))
    axes.yaxis.set_major_formatter(label)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e1e5e9", linewidth=0.7)
    axes.axvline(context, color="#1c2127", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.legend(loc="upper left")


def tokens(count: int) -> str:
    """A number of tokens as people write it: 128K for 131,072, 1M for 1,048,576; others in digits."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"


_bytes_label = FuncFormatter(lambda value, _: _scaled(value, ("B", "kB", "MB", "GB", "TB")))
_flops_label = FuncFormatter(lambda value, _: _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")))
