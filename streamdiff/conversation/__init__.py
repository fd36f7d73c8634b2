"""A conversation with a face: it listens, thinks, answers, and stops when it is spoken over. No sockets."""
