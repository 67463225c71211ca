"""Rendering and submitting jobs on a cluster. Imports `pretrain.config` only, and never torch."""
