"""Device operations of InfoBatch, importable as `infobatch_fast.kernels`; they need torch and numpy."""
