"""Launching runs, and keeping them going until they are done. Imports `pretrain.config` only, and never torch."""
