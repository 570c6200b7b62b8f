"""From text on disk to token ids in memory: corpora, tokenizers, memory-mapped shards, the sampler."""
