"""Figures on a GPU: hardware ceilings, every kernel beside its peers, whole training steps, memory and training.

benchmarks/gpu/run.sh OUT --phase speed, or
python benchmarks/gpu/run.py --out DIR [--stages ceilings,kernels,...] [--seconds 480] [--data CIFAR10.npz]
"""
