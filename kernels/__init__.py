"""Triton kernels of every adq operator, one file an operation; :mod:`adq.backends.cuda` launches them.

Equations and pointers are documented kernel by kernel. What they share:

* A tensor is walked in memory order, in tiles of ``UNROLL x LANES x VECTOR`` elements
  (:mod:`adq.kernels.tiles`): every thread holds ``VECTOR`` neighbours, 16 bytes, and the loads of
  ``UNROLL`` such vectors are in flight together. Only the last tile is masked, in a branch of its own.
* A reduction runs over a grid of programs whose size depends on the number of elements alone, never on
  the device: each program adds up its tiles in registers and writes one partial; a second kernel adds
  the partials in a fixed order, in float64. Nothing is autotuned and nothing is atomic, so results are
  the same bit for bit from run to run.
* Offsets into tensors are 64-bit.
"""
