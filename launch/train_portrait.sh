#!/usr/bin/env bash
# Trains the small model from nothing, as its model card says: heads, codec, latents, decoder, diffusion forcing,
# distillation; then makes a film with it. Started again, it goes on where it stopped.
#
#   bash launch/train_portrait.sh --head ict_facekit.npz --speech facegood_audio2rig.npz
#   bash launch/train_portrait.sh --head ict_facekit.npz --budget 10min
#
#   --head FILE      the 3D head (ICT-FaceKit, light model)
#   --speech FILE    recordings to speak from besides the synthetic voices
#   --out DIR        where everything goes (default: run)
#   --budget TIME    give each recipe this long, instead of the steps of the model card, and draw fewer clips
#   --clips N        how many clips to draw (default: 2280; with --budget 480)
#   --jobs N         processes side by side, one thread each (default: the processors there are)
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
head= speech= out=run budget= clips= jobs=$(nproc 2>/dev/null || echo 2)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --head | --speech | --out | --budget | --clips | --jobs)
            [ $# -gt 1 ] || fail "$1 needs a value; see --help"
            declare "${1#--}=$2"
            shift 2 ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done
for path in head speech out; do
    case ${!path} in "" | /*) ;; *) declare "$path=$here/${!path}" ;; esac
done
[ -n "$head" ] || fail "--head is needed to draw heads; give ict_facekit.npz"
for file in "$head" ${speech:+"$speech"}; do [ -f "$file" ] || fail "there is no $file"; done
for number in "$jobs" ${clips:+"$clips"}; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--jobs and --clips count from 1, got $number"
done
[[ $budget =~ ^([0-9]+(\.[0-9]+)?(s|min|h))?$ ]] || fail "--budget looks like 10min, 2h or 90s, got $budget"
if [ -n "$budget" ]; then clips=${clips:-480}; else clips=${clips:-2280}; fi
install demo -e ".[avatar,demo]"
export OMP_NUM_THREADS=1
# Bash runs what is behind an ampersand in a shell of its own, deaf to Ctrl-C: end it, and what it runs, by name.
stop() {
    local process
    for process in $(jobs -p); do
        pkill -P "$process" || true
        kill "$process" || true
    done 2>/dev/null
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

train() { "$venv/bin/streamdiff" train "$@"; }
# learn FOLDER FILE STEPS RECIPE OPTION...: unless the file it ends with is there.
learn() {
    local folder=$out/$1 file=$2 steps=$3 recipe=$4 length
    shift 4
    [ -e "$folder/$file" ] && return
    if [ -n "$budget" ]; then length=(--budget "$budget"); else length=(--steps "$steps"); fi
    say "Training: $recipe, into $folder"
    [ ! -e "$folder/checkpoint.safetensors" ] || length+=(--resume)
    train "$recipe" "$@" "${length[@]}" --out "$folder"
}

say "Drawing $clips clips into $out/faces"
drawing=()
for ((part = 0; part < jobs; part++)); do
    train data --head "$head" ${speech:+--speech "$speech"} --clips "$clips" --part "$part/$jobs" --out "$out/faces" &
    drawing+=($!)
done
for process in "${drawing[@]}"; do wait "$process"; done
learn codec codec.safetensors 2200 codec --data "$out/faces"
codec=$out/codec/codec.safetensors
[ -e "$out/latents/latents.safetensors" ] || train encode --data "$out/faces" --codec "$codec" --out "$out/latents"
decoder() {
    learn decoder codec.safetensors 4700 codec --data "$out/faces" --init "$codec" --disturb 0.3 --latents 4
}
forcing() { learn forcing dit.safetensors 8400 forcing --data "$out/latents" --bf16 --served 0.5 --portrait 1 --visible 0.5; }
if [ "$jobs" -gt 1 ]; then
    decoder &
    beside=$!
    forcing
    wait "$beside"
else
    decoder
    forcing
fi
learn distil dit.safetensors 350 distil --data "$out/latents" --teacher "$out/forcing/dit.safetensors" --bf16 \
    --lr 5e-5 --adaptive-sink 0.3 --codec "$out/decoder/codec.safetensors"
mkdir -p "$out/mine"
cp "$out/decoder/codec.safetensors" "$out/mine/"
cp "$out/distil/dit.safetensors" "$out/mine/diffusion_pytorch_model.safetensors"
"$venv/bin/streamdiff" generate --checkpoint "$out/mine" --out "$out/mine.mp4"
