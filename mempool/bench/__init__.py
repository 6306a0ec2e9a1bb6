"""`mempool bench kernels`: every kernel beside its peers in one interleaved run, after a correctness gate.

``run`` measures, ``report`` says and keeps the result, ``plot`` draws it; ``cases`` holds what is measured. Needs torch
and the kernels' own library (Numba or Triton), no more: peers and matplotlib are used where they are installed.

``serve`` and ``train`` measure what surrounds the kernels, look-ups and training steps of pools, in the same manner and
with the same parts; they need mempool[server]. ``processes`` are what they start.
"""
