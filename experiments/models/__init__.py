"""Models of the experiments that load pretrained weights."""
