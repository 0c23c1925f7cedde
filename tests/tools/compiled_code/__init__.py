"""What compilers made of the GPU kernels: PTX is read, one block is run from it, and checked."""
