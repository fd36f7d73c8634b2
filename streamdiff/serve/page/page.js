// The page of `streamdiff serve`: one session, its picture and sound over WebRTC, its messages over a data channel; all
// of it over a WebSocket where WebRTC does not get through.

import { Packets, canWatch } from "./packets.js";

const $ = (id) => document.getElementById(id);
const face = $("face");
const STAGES = [
  "end of turn", "transcript", "first word", "first sound", "answer", "voice", "face", "encode", "audible", "interrupt", "silent",
];
const KEEP = 24;
const PROBE_MS = 5;
const LOUD = 0.01;
const MOST_MUTED_MS = 1000;
const GIVE_UP_MS = 6000; // WebRTC on a network that lets it through stands after half a second

// For the tests, and for the curious: everything that the page knows.
const state = (window.streamdiff = {
  session: null, status: "off", ready: null, latencies: [], stats: {}, events: [], connections: 0, sync_ms: null,
  transport: "webrtc", loud,
});

let peer = null;
let channel = null;
let info = null;
let micStream = null;
let audioSender = null;
let packets = null;
let packetSink = null;
let packetTimer = null;
let micContext = null; // where WebRTC does not carry the microphone
let audioContext = null;
let analyser = null;
let stopping = false;
let retryTimer = null;
let attempt = 0;

function token() { return sessionStorage.getItem("token") ?? ""; }

async function api(method, path, body, headers = {}) {
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (body !== undefined && !(body instanceof Blob)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  const response = await fetch(path, { method, headers, body });
  if (response.status === 204) return {};
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const error = new Error(answer.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  error.retryAfter = Number(response.headers.get("Retry-After") ?? 0);
  throw error;
}

function send(message) {
  const text = JSON.stringify(message);
  if (packets?.isOpen) packets.send(text);
  else if (channel?.readyState === "open") channel.send(text);
  else return false;
  return true;
}

function show(status, text) {
  state.status = status;
  $("status").dataset.state = status;
  $("status").textContent = text ?? status;
}

function overlay(title, text, button) {
  $("overlay").hidden = !title;
  $("overlay-title").textContent = title ?? "";
  $("overlay-text").textContent = text ?? "";
  $("start").hidden = !button;
  $("start").textContent = button ?? "";
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text ?? "";
}

function enable(on) {
  for (const id of ["text", "send", "interrupt", "leave"]) $(id).disabled = !on;
  const hears = state.ready?.hears;
  $("mic").disabled = !on || !hears;
  $("mic").hidden = on && !hears;
}

function caption({ role, text, turn, final }) {
  const id = `caption-${role}-${turn}`;
  const list = $("captions");
  const stick = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  let item = document.getElementById(id);
  if (!item) {
    item = document.createElement("li");
    item.id = id;
    item.className = role;
    list.append(item);
    while (list.children.length > 100) list.firstElementChild.remove();
  }
  item.textContent = text;
  item.classList.toggle("partial", !final);
  if (role === "avatar") $("subtitle").textContent = text.length > 90 ? `…${text.slice(-90)}` : text;
  if (stick) list.scrollTop = list.scrollHeight;
}

function latency(stage, ms, turn) {
  state.latencies.push({ stage, ms, turn });
  if (state.latencies.length > 500) state.latencies.shift();
  const box = $("latency");
  let row = box.querySelector(`canvas[data-stage="${stage}"]`);
  if (!row) {
    box.querySelector(".hint")?.remove();
    const name = document.createElement("span");
    name.textContent = stage;
    row = document.createElement("canvas");
    row.dataset.stage = stage;
    row.setAttribute("role", "img");
    const value = document.createElement("span");
    value.className = "ms";
    box.append(name, row, value);
  }
  const values = state.latencies.filter((l) => l.stage === stage).map((l) => l.ms).slice(-KEEP);
  const sorted = [...values].sort((a, b) => a - b);
  row.nextElementSibling.textContent = `${Math.round(ms)} ms`;
  row.setAttribute("aria-label", `${stage}: ${Math.round(ms)} ms, median ${Math.round(sorted[sorted.length >> 1])} ms`);
  draw(row, values);
}

function draw(canvas, values) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const most = Math.max(...values, 1);
  const step = canvas.width / KEEP;
  context.fillStyle = style.getPropertyValue("--line");
  context.fillRect(0, canvas.height - scale, canvas.width, scale);
  context.fillStyle = style.getPropertyValue(`--s${(Math.max(0, STAGES.indexOf(canvas.dataset.stage)) % 7) + 1}`);
  values.forEach((value, k) => {
    const height = Math.max(2 * scale, (value / most) * (canvas.height - 2 * scale));
    context.fillRect(k * step, canvas.height - height, Math.max(1, step - 2 * scale), height);
  });
}

function redraw() {
  for (const canvas of document.querySelectorAll("#latency canvas")) {
    draw(canvas, state.latencies.filter((l) => l.stage === canvas.dataset.stage).map((l) => l.ms).slice(-KEEP));
  }
}

const samples = new Float32Array(256);

function arrives() {
  analyser?.getFloatTimeDomainData(samples);
  return samples.some((x) => Math.abs(x) > LOUD);
}

// Whether the face is heard now: what arrives is loud, and not muted.
function loud() { return !face.muted && arrives(); }

let probe = null;

function listenFor(what, sinceMs) {
  clearInterval(probe);
  let quietSince = null;
  probe = setInterval(() => {
    const isLoud = loud(); // a pause between two words is shorter than 400 ms
    const now = performance.now();
    if (what === "audible" && isLoud) finish(now);
    if (what === "silent") {
      quietSince = isLoud ? null : quietSince ?? now;
      if (quietSince !== null && now - quietSince > 400) finish(quietSince);
    }
    if (now - sinceMs > 10_000) clearInterval(probe);
  }, PROBE_MS);
  function finish(atMs) {
    clearInterval(probe);
    latency(what, Math.max(0, atMs - sinceMs), 0);
  }
}

async function start() {
  clearTimeout(retryTimer);
  notice();
  stopping = false;
  show("busy", "connecting");
  overlay("Connecting", "Opening a session.");
  try {
    if ($("token-form").hidden === false && $("token").value) sessionStorage.setItem("token", $("token").value);
    await learn();
    const session = await api("POST", "/v1/sessions", { avatar: $("avatar").value });
    state.session = session.id;
    state.codec = session.codec;
    sessionStorage.setItem("session", session.id);
    attempt = 0;
    await connect();
  } catch (error) {
    refused(error);
  }
}

function refused(error) {
  show("bad", "not connected");
  if (error.status === 401) {
    $("token-form").hidden = false;
    overlay("A token is needed", "This server lets in only those with an access token.", "Start");
    $("token").focus();
  } else if (error.status === 503 || error.status === 429) {
    wait(error.retryAfter || 5, error.status === 429 ? error.message : `This server holds ${info?.capacity ?? "so many"} at once`);
  } else {
    overlay("That did not work", error.message, "Try again");
  }
}

function wait(seconds, why) {
  overlay("All seats are taken", `${why}. Trying again in ${seconds} s.`, "Try now");
  show("busy", "waiting for a seat");
  retryTimer = setTimeout(() => (seconds > 1 ? wait(seconds - 1, why) : start()), 1000);
}

async function learn() {
  info = await api("GET", "/v1/info");
  const chosen = $("avatar").value;
  const brought = [...$("avatar").options].filter((o) => o.dataset.brought);
  $("avatar").replaceChildren(...info.avatars.map((name) => new Option(name, name)), ...brought);
  if (chosen) $("avatar").value = chosen;
  $("photo-form").hidden = !info.takes_photos;
  $("text").placeholder = info.mind ? "Ask something" : "Type something to say";
  if (!info.mind) $("overlay-text").textContent = "The face says what you type. It is synthetic, and so is its voice.";
}

async function connect() {
  peer?.close();
  const mine = (peer = new RTCPeerConnection({ iceServers: info?.ice_servers ?? [] }));
  mine.addTransceiver("video", { direction: "recvonly" });
  const sound = mine.addTransceiver("audio", { direction: "sendrecv" });
  audioSender = sound.sender;
  channel = mine.createDataChannel("events");
  channel.onmessage = ({ data }) => heard(JSON.parse(data));
  mine.ontrack = ({ track, streams, receiver }) => {
    if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
    else receiver.playoutDelayHint = 0; // its name before 2024
    if (face.srcObject !== streams[0]) face.srcObject = streams[0];
    if (track.kind === "audio") tap(streams[0]);
  };
  mine.onconnectionstatechange = () => mine === peer && changed(mine.connectionState);
  await mine.setLocalDescription();
  await gathered(mine);
  const answer = await api("POST", `/v1/sessions/${state.session}/offer`, { sdp: mine.localDescription.sdp });
  clearTimeout(packetTimer);
  packetTimer = setTimeout(() => mine === peer && mine.connectionState !== "connected" && overSocket(), GIVE_UP_MS);
  await mine.setRemoteDescription({ type: "answer", sdp: answer.sdp });
  if (micStream) await audioSender.replaceTrack(micStream.getAudioTracks()[0]);
}

function gathered(pc) {
  return new Promise((resolve) => {
    const done = () => pc.iceGatheringState === "complete" && resolve();
    pc.addEventListener("icegatheringstatechange", done);
    setTimeout(resolve, 1000);
    done();
  });
}

function tap(heardAs) {
  const source = heardAs instanceof MediaStream ? audioContext.createMediaStreamSource(heardAs) : heardAs;
  analyser = audioContext.createAnalyser();
  analyser.fftSize = 256;
  source.connect(analyser);
}

function stands() {
  attempt = 0;
  state.connections += 1;
  overlay();
  enable(true);
  if (packets && micStream) carry();
  if (!document.activeElement || document.activeElement === document.body) $("text").focus();
}

// WebRTC does not get through: the same session over a WebSocket.
function overSocket() {
  if (!canWatch() || stopping) return stopping ? undefined : lost();
  clearTimeout(retryTimer);
  peer?.close();
  packets?.close();
  peer = channel = audioSender = null;
  state.transport = "websocket";
  packetSink?.disconnect();
  packetSink = audioContext.createGain();
  packetSink.connect(audioContext.destination);
  tap(packetSink);
  face.hidden = true;
  $("picture").hidden = false;
  before = {};
  const mine = (packets = new Packets({
    url: `${location.protocol.replace("http", "ws")}//${location.host}/v1/sessions/${state.session}/media`,
    token: token(), codec: state.codec, canvas: $("picture"), audio: audioContext, sink: packetSink,
    onopen: stands,
    onmessage: (text) => heard(JSON.parse(text)),
    onclose: () => mine === packets && !stopping && lost(),
  }));
}

function mute(on) {
  face.muted = on;
  if (packetSink) packetSink.gain.value = on ? 0 : 1;
}

function changed(connection) {
  if (connection === "connected") {
    clearTimeout(packetTimer);
    stands();
    face.play().catch(() => notice("Press anywhere to hear the sound: the browser waits for that."));
  } else if (connection === "failed" && !stopping && !state.connections) {
    overSocket();
  } else if ((connection === "failed" || connection === "disconnected") && !stopping) {
    lost();
  }
}

function lost() {
  enable(false);
  show("busy", "reconnecting");
  overlay("Connection lost", "The session is kept for a while. Reconnecting.", "Try now");
  clearTimeout(retryTimer);
  retryTimer = setTimeout(again, Math.min(8000, 500 * 2 ** attempt++));
}

async function again() {
  clearTimeout(retryTimer);
  try {
    info ??= await api("GET", "/v1/info");
    await api("GET", `/v1/sessions/${state.session}`);
    if (state.transport === "websocket") return overSocket();
    await connect();
    retryTimer = setTimeout(() => peer && peer.connectionState !== "connected" && lost(), 10_000);
  } catch (error) {
    if (error.status === 404) ended("gone");
    else if (error.status === 410) ended("failed");
    else if (error.status === 401) refused(error);
    else lost();
  }
}

const WHY = {
  left: "You have ended it.", gone: "It was closed while you were away.", idle: "Nobody said anything for a while.",
  lifetime: "It reached the longest time that a session may last.", drained: "The server is shutting down.",
  revoked: "The consent behind this face was withdrawn.", finished: "The stream has ended.",
  failed: "Something broke on the server.",
};

function ended(reason) {
  stopping = true;
  clearTimeout(retryTimer);
  sessionStorage.removeItem("session");
  state.session = null;
  clearTimeout(packetTimer);
  peer?.close();
  packets?.close();
  packets = null;
  micOff();
  enable(false);
  show("off", "not connected");
  overlay("The session has ended", WHY[reason] ?? reason, "Start again");
  $("subtitle").textContent = "";
}

async function leave() {
  if (state.session) await api("DELETE", `/v1/sessions/${state.session}`).catch(() => {});
  ended("left");
}

let unmuteTimer = null;
let userSpeaks = false;

function heard(event) {
  state.events.push(event);
  if (state.events.length > 500) state.events.shift();
  switch (event.type) {
    case "ready":
      state.ready = event;
      $("recorded").hidden = !event.recorded;
      enable(true);
      break;
    case "hearing": userSpeaks = event.speaking; break;
    case "status":
      show(event.state);
      if (event.state !== "speaking") unmute();
      if (event.state === "idle") $("subtitle").textContent = "";
      break;
    case "caption": caption(event); break;
    case "latency": latency(event.stage, event.ms, event.turn); break;
    case "stopped":
      if (event.segment) {
        [...document.querySelectorAll("#captions li.avatar")].at(-1)?.classList.add("cut");
        mute(true); // whoever spoke: what has left the server is not worth hearing any more
      }
      packets?.hush();
      unmute();
      break;
    case "problem":
      notice(event.text);
      if (event.code === "recording") $("recorded").hidden = true;
      break;
    case "ended": ended(event.reason); break;
  }
}

function unmute() {
  // What is still in the jitter buffer belongs to the interrupted answer. While the user speaks nothing else is there.
  const latest = performance.now() + MOST_MUTED_MS;
  const settle = () => {
    if (userSpeaks && arrives() && performance.now() < latest) unmuteTimer = setTimeout(settle, PROBE_MS);
    else mute(false);
  };
  clearTimeout(unmuteTimer);
  unmuteTimer = setTimeout(settle, (state.stats.jitter_buffer_ms ?? 80) + 60);
}

function interrupt() {
  if (!send({ type: "interrupt" })) return;
  const at = performance.now();
  if (state.status === "speaking") {
    mute(true);
    unmuteTimer = setTimeout(() => mute(false), 1500);
    listenFor("silent", at);
  }
}

async function micOn() {
  try {
    const device = $("input-device").value;
    micStream = await navigator.mediaDevices.getUserMedia({
      audio: {
        echoCancellation: true, noiseSuppression: true, autoGainControl: true,
        ...(device ? { deviceId: { exact: device } } : {}),
      },
    });
  } catch (error) {
    const why = { NotAllowedError: "The browser may not use the microphone: allow it beside the address, or type instead.",
      NotFoundError: "There is no microphone: type instead.", NotReadableError: "Another program holds the microphone." };
    notice(why[error.name] ?? `No microphone: ${error.message}. Type instead.`);
    return;
  }
  notice();
  $("mic").setAttribute("aria-pressed", "true");
  if (packets) await carry();
  await audioSender?.replaceTrack(micStream.getAudioTracks()[0]);
  await devices();
}

// Sends the microphone over the WebSocket: 16-bit samples at 24 kHz, as the server's own doors take them.
async function carry() {
  if (micContext) return;
  const context = (micContext = new AudioContext({ sampleRate: 24000 }));
  const mine = micStream;
  try {
    await context.audioWorklet.addModule("/page/mic.js");
    if (mine !== micStream) return; // switched off meanwhile
    const node = new AudioWorkletNode(context, "mic", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => packets?.append(data);
    context.createMediaStreamSource(mine).connect(node);
  } catch (error) {
    micOff();
    notice(`The microphone cannot be carried over this connection: ${error.message}. Type instead.`);
  }
}

function micOff() {
  micStream?.getTracks().forEach((track) => track.stop());
  micStream = null;
  micContext?.close();
  micContext = null;
  $("mic").setAttribute("aria-pressed", "false");
  audioSender?.replaceTrack(null).catch(() => {});
}

async function devices() {
  if (!navigator.mediaDevices?.enumerateDevices) return;
  const all = await navigator.mediaDevices.enumerateDevices();
  for (const [id, kind] of [["input-device", "audioinput"], ["output-device", "audiooutput"]]) {
    const chosen = $(id).value;
    const named = all.filter((d) => d.kind === kind && d.deviceId && d.deviceId !== "default");
    $(id).replaceChildren(new Option("System default", ""), ...named.map((d) => new Option(d.label || kind, d.deviceId)));
    $(id).value = named.some((d) => d.deviceId === chosen) ? chosen : "";
  }
  $("output-device").disabled = !("setSinkId" in face);
}

let before = {};

function measurePackets() {
  const now = { at: performance.now(), ...packets.stats };
  if (before.decoded !== undefined) {
    const seconds = (now.at - before.at) / 1000;
    state.sync_ms = now.sync_ms;
    state.stats = {
      fps: (now.drawn - before.drawn) / seconds, dropped: now.dropped, decoded: now.decoded, keys: now.keys, late: now.late,
      jitter_buffer_ms: packets.lead_ms, kbps: (8 * (now.bytes - before.bytes)) / seconds / 1000,
    };
    send({
      type: "report", frames_decoded: now.decoded, frames_dropped: now.dropped, key_frames: now.keys,
      jitter_buffer_ms: packets.lead_ms,
    });
    numbers({
      Picture: `${state.stats.fps.toFixed(1)} frames/s`, Dropped: `${now.dropped} of ${now.decoded}`,
      "Video − audio": now.sync_ms === null ? "–" : `${now.sync_ms.toFixed(0)} ms`, "Late sound": `${now.late}`,
      Bitrate: `${state.stats.kbps.toFixed(0)} kbit/s`, Keyframes: `${now.keys}`, Carried: "over a WebSocket",
    });
  }
  before = now;
}

async function measure() {
  if (packets?.isOpen) return measurePackets();
  if (peer?.connectionState !== "connected") return;
  const now = { at: performance.now() };
  const playout = {};
  for (const report of (await peer.getStats()).values()) {
    if (report.type === "inbound-rtp" && report.kind === "video") {
      Object.assign(now, {
        decoded: report.framesDecoded ?? 0, dropped: report.framesDropped ?? 0, keys: report.keyFramesDecoded ?? 0,
        freezes: report.freezeCount ?? 0, bytes: report.bytesReceived ?? 0, plis: report.pliCount ?? 0,
        vdelay: report.jitterBufferDelay ?? 0, vcount: report.jitterBufferEmittedCount ?? 0,
      });
      playout.video = report.estimatedPlayoutTimestamp;
    } else if (report.type === "inbound-rtp" && report.kind === "audio") {
      Object.assign(now, {
        concealed: report.concealedSamples ?? 0, delay: report.jitterBufferDelay ?? 0,
        count: report.jitterBufferEmittedCount ?? 0,
      });
      playout.audio = report.estimatedPlayoutTimestamp;
    } else if (report.type === "candidate-pair" && report.nominated) {
      now.rtt = 1000 * (report.currentRoundTripTime ?? 0);
    }
  }
  if (before.decoded !== undefined && now.decoded >= before.decoded) {
    const seconds = (now.at - before.at) / 1000;
    const jitter = now.count > before.count ? (1000 * (now.delay - before.delay)) / (now.count - before.count) : 0;
    state.sync_ms = playout.audio && playout.video ? playout.audio - playout.video : null;
    state.stats = {
      fps: (now.decoded - before.decoded) / seconds, dropped: now.dropped, decoded: now.decoded, keys: now.keys,
      freezes: now.freezes, concealed: now.concealed, jitter_buffer_ms: jitter, round_trip_ms: now.rtt ?? 0,
      kbps: (8 * (now.bytes - before.bytes)) / seconds / 1000, plis: now.plis,
    };
    send({
      type: "report", frames_decoded: now.decoded, frames_dropped: now.dropped, key_frames: now.keys,
      freezes: now.freezes, concealed_samples: Math.round(now.concealed ?? 0),
      jitter_buffer_ms: Math.max(0, jitter || 0), round_trip_ms: Math.max(0, now.rtt ?? 0),
    });
    numbers({
      Picture: `${state.stats.fps.toFixed(1)} frames/s`, Dropped: `${now.dropped} of ${now.decoded}`,
      "Audio − video": state.sync_ms === null ? "–" : `${state.sync_ms.toFixed(0)} ms`,
      "Jitter buffer": `${jitter.toFixed(0)} ms`, "Round trip": `${(now.rtt ?? 0).toFixed(0)} ms`,
      Bitrate: `${state.stats.kbps.toFixed(0)} kbit/s`, Freezes: `${now.freezes}`, Keyframes: `${now.keys}`,
    });
  }
  before = now;
}

function numbers(values) {
  $("numbers").replaceChildren(...Object.entries(values).flatMap(([name, value]) => {
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

$("start").addEventListener("click", () => {
  // Inside the click: browsers let sound begin only then.
  audioContext ??= new AudioContext({ latencyHint: "interactive" });
  audioContext.resume();
  return state.session && !stopping ? again() : start();
});
$("leave").addEventListener("click", leave);
$("interrupt").addEventListener("click", interrupt);
$("mic").addEventListener("click", () => (micStream ? micOff() : micOn()));
$("token-form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || !send({ type: "say", text })) return;
  notice();
  listenFor("audible", performance.now());
  $("text").value = "";
});
$("input-device").addEventListener("change", async () => { if (micStream) { micOff(); await micOn(); } });
$("output-device").addEventListener("change", () => face.setSinkId($("output-device").value).catch((e) => notice(e.message)));
$("photo").addEventListener("change", () => {
  const [file] = $("photo").files;
  $("preview").hidden = !file;
  if (file) $("preview").src = URL.createObjectURL(file);
  mayUpload();
});
$("consent").addEventListener("change", mayUpload);
$("photo-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = $("photo").files;
  $("upload").disabled = true;
  $("upload").textContent = "Reading the photograph";
  try {
    const { avatar } = await api("POST", "/v1/avatars", file, { "X-Consent": "yes" });
    const option = new Option("your photograph", avatar, true, true);
    option.dataset.brought = "yes";
    $("avatar").append(option);
    notice();
    if (state.session) { await leave(); await start(); }
  } catch (error) {
    notice(error.message);
  } finally {
    $("upload").textContent = "Use this photograph";
    mayUpload();
  }
});
$("avatar").addEventListener("change", async () => { if (state.session) { await leave(); await start(); } });
function mayUpload() { $("upload").disabled = !($("photo").files.length && $("consent").checked); }

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { event.preventDefault(); interrupt(); }
  if (event.altKey && event.code === "KeyM" && !$("mic").disabled) { event.preventDefault(); $("mic").click(); }
});
document.addEventListener("click", () => face.paused && face.srcObject && face.play().catch(() => {}));
document.addEventListener("visibilitychange", () => !document.hidden && redraw());
window.addEventListener("resize", redraw);

function theme(next) {
  if (next) localStorage.setItem("theme", next);
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  redraw();
}
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  theme(dark ? "light" : "dark");
});

theme();
setInterval(measure, 1000);
devices();
learn().then(() => {
  const kept = sessionStorage.getItem("session");
  if (!kept) return overlay("Ready when you are", $("overlay-text").textContent, "Start");
  // A reload: the session stands, but sound needs a click again.
  return api("GET", `/v1/sessions/${kept}`).then(
    () => { state.session = kept; overlay("Welcome back", "Your session is still there.", "Continue"); },
    () => sessionStorage.removeItem("session"),
  );
}).catch(refused);
