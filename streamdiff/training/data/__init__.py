"""Video with sound to learn from: talking heads drawn with known truth, and clips of real people, by one interface.

    streamdiff train data --head ict_facekit.npz --out faces
    streamdiff train data --video anna.mp4 ben.mp4 --out faces

`drawn.DrawnClips` makes a head (`faces.Painter`), a voice (`speech`), a mouth that follows the voice (`articulation`)
and an action that a prompt names (`score`). `recorded.RecordedClips` reads files of video with sound. Both give
`clip.Clip`; `shards.write_shards` puts them on disk, `shards.Shards` reads them.
"""
