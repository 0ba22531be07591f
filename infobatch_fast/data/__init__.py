"""Tensors and files to batches: data sets, augmentation and the loaders."""
