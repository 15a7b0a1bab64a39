"""Runs on the CPU what Triton compiles for an NVIDIA GPU, and looks for what compute-sanitizer looks for.

The PTX of a kernel is interpreted on CPU tensors: 32 lanes of a warp as a numpy array, warps in random turns, the blocks of a
grid in random order. Reported: accesses outside of the tensors of a launch or not aligned, races (two warps of a block that no
barrier orders, in shared or global memory; two blocks of a launch), barriers and shuffles that not all live lanes reach, reads
of shared memory that nobody wrote.

Not emulated: tensor cores (mma, wgmma, TMA), what ptxas makes of the PTX, weaker memory ordering than the order of execution.

    values -> program (parsing) -> memory -> assembler, with instructions in arithmetic, conversions, exchange, transfers
    -> machine (warps, blocks, grids) -> launcher (in place of the kernels' `launch`)
"""
