"""Model folders in the Hugging Face layout: config.json, safetensors shards, tokenizer files."""
