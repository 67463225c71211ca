"""Tools that make and tend image-text shards. Never imports torch, `pretrain` or `launch`."""
