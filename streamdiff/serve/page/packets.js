// Pictures and sound over a WebSocket, decoded by WebCodecs: for networks that WebRTC does not get through.
//
// The loudspeaker's clock is the clock. Sound is played LEAD_S after it comes; each picture is drawn when its sound is
// heard. Sound that comes too late moves the clock: a short pause, and both are in step again.

const LEAD_S = 0.15;
const SLACK_S = 0.01;
const JUMP_S = 2;
const MOST_PICTURES = 50;
const MOST_UNSENT = 65_536; // bytes: a microphone that is seconds late is of no use
const PICTURE = 0, KEYFRAME = 1, SOUND = 2, HEADER_BYTES = 16;
const CODECS = { vp8: "vp8", h264: "avc1.42E01F" };

export function canWatch() {
  return "VideoDecoder" in window && "AudioDecoder" in window && "WebSocket" in window;
}

export class Packets {
  // audio: an AudioContext; sink: the node that is heard; canvas: where pictures are drawn.
  constructor({ url, token, codec, canvas, audio, sink, onopen, onmessage, onclose }) {
    this.stats = { decoded: 0, drawn: 0, dropped: 0, keys: 0, late: 0, bytes: 0, sync_ms: null };
    this.audio = audio;
    this.sink = sink;
    this.canvas = canvas;
    this.offset = null; // of the loudspeaker's clock from the stream's, seconds
    this.pictures = [];
    this.sources = new Set();
    this.needsKey = true;
    const fail = (error) => { console.warn("a decoder failed:", error.message); this.socket.close(); };
    this.video = new VideoDecoder({ output: (frame) => this.queue(frame), error: fail });
    this.video.configure({ codec: CODECS[codec] ?? CODECS.vp8, optimizeForLatency: true });
    this.sound = new AudioDecoder({ output: (data) => this.play(data), error: fail });
    this.sound.configure({ codec: "opus", sampleRate: 48000, numberOfChannels: 1 });
    // Keys go into subprotocols: a URL is logged everywhere.
    this.socket = new WebSocket(url, token ? ["streamdiff", `openai-insecure-api-key.${token}`] : ["streamdiff"]);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = onopen;
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? onmessage(data) : this.take(data));
    this.socket.onclose = (event) => { this.stop(); onclose(event); };
    const draw = () => { this.draw(); if (!this.stopped) requestAnimationFrame(draw); };
    requestAnimationFrame(draw);
  }

  get isOpen() { return this.socket.readyState === WebSocket.OPEN; }

  get lead_ms() { return 1000 * LEAD_S; }

  send(text) { this.socket.send(text); }

  // 16-bit samples of the microphone, mono, 24 kHz.
  append(samples) {
    if (!this.isOpen || this.socket.bufferedAmount > MOST_UNSENT) return;
    const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
    this.send(JSON.stringify({ type: "input_audio_buffer.append", audio: btoa(String.fromCharCode(...bytes)) }));
  }

  // Forget sound that waits: an interrupted answer.
  hush() {
    for (const source of this.sources) source.stop();
    this.sources.clear();
  }

  close() {
    this.socket.onclose = null;
    this.socket.close();
    this.stop();
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    this.hush();
    for (const frame of this.pictures.splice(0)) frame.close();
    for (const decoder of [this.video, this.sound]) if (decoder.state !== "closed") decoder.close();
  }

  take(buffer) {
    if (this.stopped || buffer.byteLength <= HEADER_BYTES) return;
    const view = new DataView(buffer);
    const kind = view.getUint8(0);
    const timestamp = Math.round(view.getFloat64(8, true));
    const data = new Uint8Array(buffer, HEADER_BYTES);
    this.stats.bytes += buffer.byteLength;
    if (kind === SOUND) {
      this.sound.decode(new EncodedAudioChunk({ type: "key", timestamp, data }));
    } else if (kind === PICTURE || kind === KEYFRAME) {
      this.needsKey &&= kind !== KEYFRAME;
      if (this.needsKey) return;
      this.stats.keys += kind === KEYFRAME;
      this.video.decode(new EncodedVideoChunk({ type: kind === KEYFRAME ? "key" : "delta", timestamp, data }));
    }
  }

  play(data) {
    const at = data.timestamp / 1e6;
    const now = this.audio.currentTime;
    const isLate = this.offset !== null && at + this.offset < now + SLACK_S;
    if (this.offset === null || isLate || at + this.offset > now + JUMP_S) {
      this.stats.late += isLate;
      this.offset = now + LEAD_S - at;
    }
    const buffer = this.audio.createBuffer(1, data.numberOfFrames, data.sampleRate);
    data.copyTo(buffer.getChannelData(0), { planeIndex: 0, format: "f32-planar" });
    data.close();
    const source = new AudioBufferSourceNode(this.audio, { buffer });
    source.connect(this.sink);
    source.onended = () => this.sources.delete(source);
    this.sources.add(source);
    source.start(at + this.offset);
  }

  queue(frame) {
    this.stats.decoded += 1;
    this.pictures.push(frame);
    while (this.pictures.length > MOST_PICTURES) { // a hidden page draws nothing
      this.pictures.shift().close();
      this.stats.dropped += 1;
    }
  }

  draw() {
    if (this.stopped || this.offset === null) return;
    const heard = this.audio.currentTime - (this.audio.outputLatency || 0) - this.offset;
    let due = null;
    while (this.pictures.length && this.pictures[0].timestamp / 1e6 <= heard) {
      if (due) { due.close(); this.stats.dropped += 1; }
      due = this.pictures.shift();
    }
    if (!due) return;
    const { canvas } = this;
    if (canvas.width !== due.displayWidth) [canvas.width, canvas.height] = [due.displayWidth, due.displayHeight];
    canvas.getContext("2d").drawImage(due, 0, 0);
    this.stats.drawn += 1;
    this.stats.sync_ms = 1000 * (due.timestamp / 1e6 - heard); // below 0: the picture is behind its sound
    due.close();
  }
}
