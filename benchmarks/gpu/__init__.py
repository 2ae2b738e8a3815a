"""What only a GPU can show: ``python -m benchmarks.gpu``, and ``python -m benchmarks.gpu.several`` for several GPUs."""
