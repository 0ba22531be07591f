"""Device operations of InfoBatch: `infobatch_fast.kernels`. They need torch, Triton and numpy."""
