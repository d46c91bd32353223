"""What a stored number means: E2M1, E4M3, E8M0, BF16, block scales; exact reference codecs and fast casts.

`codec` says in numpy and float64 what every cast must give; `casts` gives the same, fast. Importing either compiles
nothing: a kernel is compiled when it is first called, and cached on disk.
"""
