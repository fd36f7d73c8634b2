"""Serving live sessions: leases, a pump that encodes once for many viewers, and thin doors around it.

    session -> pump -> one encoded picture and 20 ms blocks of sound -> WebRTC, WebSocket, files, adapters

`calls` is where every door begins: it leases a seat, opens a session and puts it on the air. `local` is the door
without sockets that tests use.
"""
