"""`mempool bench kernels`: every kernel beside its peers in one interleaved run, after a correctness gate.

``run`` measures, ``report`` says and keeps the result, ``plot`` draws it; ``cases`` holds what is measured. Needs torch
and the kernels' own library (Numba or Triton), no more: peers and matplotlib are used where they are installed.
"""
