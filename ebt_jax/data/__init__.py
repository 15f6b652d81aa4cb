"""What a run reads: sources, tokenizers, packing, pipelines."""
