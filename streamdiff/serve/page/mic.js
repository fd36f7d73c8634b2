// Cuts a microphone into blocks of 20 ms of 16-bit samples, in the browser's audio thread. The rate is the context's.

class Mic extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(Math.round(sampleRate / 50));
    this.held = 0;
  }

  process([[samples]]) {
    for (const sample of samples ?? []) {
      this.block[this.held++] = Math.round(32767 * Math.max(-1, Math.min(1, sample)));
      if (this.held < this.block.length) continue;
      this.port.postMessage(this.block.slice());
      this.held = 0;
    }
    return true;
  }
}

registerProcessor("mic", Mic);
