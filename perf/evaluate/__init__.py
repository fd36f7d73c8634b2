"""How good a trained model is: in step with speech, the same person, for how long, and how fast it obeys.

    python perf/evaluate --head ict_facekit.npz --speech facegood_audio2rig.npz
    python perf/evaluate --head ict_facekit.npz --long 10000 --variant full      (and every other variant)
    python perf/evaluate --draw                                                  all long runs in one picture

**What is judged.** Streams of the real engine: its intake, its stages, its decoder, fed with speech chunk by chunk, one
rank in this process. Persons are drawn heads whose numbers begin at 1,000,000 (training counts from 0), with speech
that no training saw: the last take of the recordings, and sentences of a synthetic voice that are drawn anew. The
voices themselves were trained on: the same synthesiser, the same recorded speaker. Of a drawn head everything is known,
so that beside every row stand the rows of the truth (the same person drawn to the same speech) and of the truth through
the codec, and a row without any picture: the opening that three lines of arithmetic make of loudness.

**How.** Pictures are read by `streamdiff.training.probe`, a network of 0.2 M parameters of our own. What it says of the
truth's own frames shows how well it reads.

- sync: correlation over time of the mouth opening that is read with the opening that the truth's rule makes of the same
  sound (`streamdiff.training.data.articulation`), at lag 0; the lag of the highest correlation, frames, positive: the
  picture is late. loudness: the same against loudness alone.
- round, wide: correlations of the rounding and of the width of the mouth with the truth's. The probe was not taught
  width; a linear reader of its features is fitted to other takes of the truth (`readers.WidthReader`).
- blinks: how often the lids shut, a minute, by a linear reader of the pixels of the eyes, fitted to another take of the
  same person (`readers.BlinkReader`); blinks_known: of the truth, as it was drawn.
- colour: mean absolute difference of 4x4 coarse colours (0..1) to the photograph. identity: root mean square difference
  of the probe's identity columns (in spreads over people) to those of the photograph, averaged over 12 frames.
- seam: change across borders of chunks over change elsewhere; seam_latent: the same across borders of latent frames,
  six a second. jitter: mean second difference. flicker: change in the upper corners, where nothing moves. sharpness:
  mean absolute Laplacian. Grey levels 0..255.
- apart: Frechet distance of probe features (64 per frame), and of short-window statistics (12 frames: mean, spread and
  step of the columns of truth), to other takes of the same persons. Network and numbers are our own: neither is an
  FID or FVD, and they compare with each other only.
- actions: sync while a prompt holds, beside what is read of the truth doing the same. gains: sync with the same speech
  made quieter or louder before the model hears it.
- prompts: frames from the first frame of the chunk that brings a prompt until the column it moves (for nods and shakes
  the rolling spread over 25 frames) has gone half-way to where it settles, and how far that is beside the truth's.
- objects: a badge that the raised hand hides for L seconds: colour of its place before and after, beside a stream in
  which no hand was raised.
- drift (long runs): every chunk's latent mean and spread per channel against the first 100 chunks; every 20 s one chunk
  is decoded (by a fresh decoder, warmed with the chunk before it) and compared with the photograph, every 500 s ten
  seconds are decoded and judged for sync. Slopes are least squares with a 95 % interval from a moving-block bootstrap
  (blocks of 120 s, longer than the loop of the speech). Crossing: when colour or identity is for three looks in a row
  further from the photograph than half the mean distance between two persons: half-way to somebody else, and no earlier
  than the first looks after 30 s. beyond: levels that the run did not keep on average (`drift.LEVELS`), which no slope
  shows.

**Variants of long runs.** full: all that was published, the adaptive sink included. no-sink: the sink's keys are
removed once the window is full (the model saw clips without a sink in training). absolute: the sink stays at its
place while the stream walks away from it; only the inference changes, the model was trained with leads drawn at
random. clean-history: after its last step a chunk is run once more at noise level 0, and all steps remember that
(Self-Forcing), instead of each what it saw. no-adaptive: the sink stays the photograph, as this model is served.

**Limits.** Drawn heads are simpler than people, and the probe has seen nothing else: numbers here rank variants of this
small model; they do not certify a large one. A model can score higher than the truth through the codec, since the probe
errs on both. One photograph and one seed per long run.
"""
