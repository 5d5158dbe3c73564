"""Gradients of any layout: who counts which element, global norms, scaling and clipping."""
