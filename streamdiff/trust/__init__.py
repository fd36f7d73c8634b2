"""Who made a file, who agreed to it, and what happened: signatures, consent, an audit log, content credentials."""
