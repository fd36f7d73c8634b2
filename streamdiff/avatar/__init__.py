"""The coefficient path: text to voice to facial coefficients to pixels, on one machine."""
