"""LoRA adapter folders in PEFT's layout: reading, merging and writing them without peft."""
