"""What compilers made of the GPU kernels: a reader of PTX, one block run from it, and what must hold."""
