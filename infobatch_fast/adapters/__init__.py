"""Pruning in other people's training loops: knows the method alone, patches nothing of torch."""
