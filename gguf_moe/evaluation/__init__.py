"""What a model predicts, layer by layer, and what its quantized files lost. Needs torch: the extra gguf-moe[eval]."""

import os

# Threads that wait for each other by spinning make a busy machine, or a container's share of one, several times slower.
# Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
