"""What ``tools.gpu_check`` and ``tools.cuda_lowering`` are made of."""
