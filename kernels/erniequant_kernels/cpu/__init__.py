"""Products with packed weights on the CPU, in vector code that LLVM compiles for this machine."""
