"""Triton kernels of every adq operator, one file an operation; :mod:`adq.backends.cuda` launches them.

Equations and pointers are documented kernel by kernel. What they share:

* A tensor is walked in memory order, in tiles of ``LANES x VECTOR`` elements (:mod:`adq.kernels.tiles`): every
  lane holds vectors of 16 bytes, two where nothing is added up. The loop over whole tiles has neither masks nor
  branches; what is left is done in tiles of ``LANES`` single elements.
* A program is one warp. Tables of up to 32 numbers lie across its lanes, one a lane, and are read by shuffles:
  a binary search takes some three instructions a step, a look-up one, and nothing waits for another warp. Longer
  tables are searched further in memory.
* A reduction runs over a grid of programs whose size depends on the number of elements alone, never on
  the device: each program adds up its tiles in registers and writes one partial; a second kernel adds
  the partials in a fixed order, in float64. Nothing is autotuned and nothing is atomic, so results are
  the same bit for bit from run to run.
* Offsets into tensors are 64-bit.
"""

import triton

if not hasattr(triton, "knobs"):
    raise ImportError(f"the kernels need Triton 3.4 or newer (torch 2.8), this is {triton.__version__}")
