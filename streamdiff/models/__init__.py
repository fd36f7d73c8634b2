"""Networks: the video DiT, the video VAE, the text and audio encoders, and what they cost."""
