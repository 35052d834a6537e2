"""What a model predicts, layer by layer, and what its quantized files lost. Needs torch: the extra gguf-moe[eval]."""
