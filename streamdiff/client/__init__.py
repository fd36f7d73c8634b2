"""Talk to a face on a server, from Python.

    from streamdiff import client

    async with client.connect("http://127.0.0.1:8100") as face:
        face.say("Hello there.")
        async for shown in face:
            print(shown.pts_s, shown.frame_HWC.shape, len(shown.sound_S))

The server is `streamdiff serve`; over the wire goes OpenAI Realtime with pictures (`streamdiff/serve/README.md`).
Nothing is connected anew behind your back: a connection that is lost raises, and ``connect(url, session=...)`` joins
the session again while the server keeps it.
"""

from streamdiff.errors import BackendError

try:
    from streamdiff.client.face import Face, connect
    from streamdiff.client.frames import Shown
    from streamdiff.client.opening import Busy, Denied, NoServer
except ModuleNotFoundError as error:
    if error.name != "aiohttp":
        raise
    raise BackendError("the client needs aiohttp; pip install 'streamdiff[client]'") from error

__all__ = ["Busy", "Denied", "Face", "NoServer", "Shown", "connect"]
