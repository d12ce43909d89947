"""What trainer and policy share about weights: the manifest and its digest, and the lossless codec of sparse deltas.

numpy, xxhash and zstandard only: no torch, no grpc. bfloat16 and 8-bit floats travel as raw unsigned integers.
"""
