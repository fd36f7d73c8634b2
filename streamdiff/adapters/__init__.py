"""A session as a part of somebody else's agent framework. Each module needs the extra of its name, and says so."""
