"""Joint image-text pretraining: tar shards in, contrastive-plus-matching weights out."""

__version__ = "0.1.0"
