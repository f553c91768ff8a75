"""Time of a layer's experts on the CPU, packed and decoded, in interleaved rounds."""
