"""Text to speech, and sound that comes from outside."""
