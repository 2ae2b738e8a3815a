"""DeepSpeed: configuration, engine and optimizer shards. Nothing outside this folder imports deepspeed."""
