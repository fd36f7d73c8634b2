"""The step and the decoder as they are served: fused, captured, with fixed addresses."""
