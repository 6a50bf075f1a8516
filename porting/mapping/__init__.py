"""Maps tensor names and axes between PyTorch and Keras."""
