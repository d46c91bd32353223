"""The plots of the page; nothing else in v4quant draws.

layers, tokens, roles   each a function from the whole result to a figure
canvas                  the common look, a log axis that shows zeros, SVG for a page
"""
