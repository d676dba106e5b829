#!/usr/bin/env bash
# What needs several GPUs, in one go, within ten minutes: one rank a GPU over NCCL killed and recovered in place bit for
# bit, overhead and recoveries measured. Every part has its own time limit, goes on after a failure, and writes as it
# goes: at most eight files, none in a folder.
# Usage: scripts/bench/on_several_gpus.sh RESULTS_DIRECTORY [PART...]
# Parts: build, tests, overhead, recovery (default: all, in this order), and smoke, which shows everything that a job
# and its recovery do, for when they don't work. DEVICE=cpu tries them without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=$1
shift
mkdir -p "$results"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=1
device=${DEVICE:-gpu}
python=${PYTHON:-python3}
began=$SECONDS
note() { echo "=== [$((SECONDS - began)) s] $*"; }
# Runs a command for at most so many seconds; its output goes to a file, the end of it here as well.
part() {
  local name=$1 seconds=$2 status
  shift 2
  note "$name (at most $seconds s)" | tee -a "$results/parts.log"
  timeout --kill-after=5 "$seconds" "$@" >"$results/part.tmp" 2>&1
  status=$?
  cat "$results/part.tmp" >>"$results/parts.log"
  tail -n "${TAIL:-15}" "$results/part.tmp" | cut -c1-400
  rm "$results/part.tmp"
  note "$name: status $status"
}
run() {
  if [ "$device" = gpu ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    nvidia-smi topo -m | head -8
    # Slots need more shared memory than a tmpfs allows that was made when the machine had less.
    mount -o remount,size=100G /dev/shm
    overhead=16-experts-pp2 model=large only=nccl
  else
    overhead=demo model=small only=gloo
  fi
  "$python" -c "
import importlib.util, torch
missing = [name for name in ('megatron.core', 'pytest', 'rich', 'xxhash', 'matplotlib') if importlib.util.find_spec(name) is None]
assert not missing, missing
print('torch', torch.__version__, 'GPUs', torch.cuda.device_count(), 'NCCL', torch.cuda.is_available() and torch.cuda.nccl.version())
" || { note "a Python package is missing: nothing can run"; exit 1; }
  for each in "${@:-build tests overhead recovery}"; do
    for one in $each; do
      case $one in
        build)
          part build 70 "$python" setup.py build_ext --inplace
          "$python" -c "import moevement_ext; print(moevement_ext.build_info())" || { note "no extension: nothing can run"; exit 1; } ;;
        smoke)
          TAIL=60 part smoke 90 "$python" scripts/bench/smoke.py "$results/smoke.log" --device "$device" --seconds 75 ;;
        tests)
          part tests 115 "$python" -m pytest -m gpu tests/gpu/test_local_recovery.py -q -s -p no:cacheprovider -k "$only" ;;
        overhead)
          part overhead 215 "$python" scripts/bench/overhead.py --model "$overhead" --window 4 --scratch /dev/shm/moevement \
            --variants off,transcript,sparse,sparse-transcript,dense-sync,dense-side,dcp --blocks 3 --block 3 \
            --slow-iterations 2 --limit-seconds 195 --output "$results/overhead" ;;
        recovery)
          part recovery 245 "$python" scripts/bench/recovery.py --device "$device" --model "$model" --pipeline 2 \
            --variants local,global,dense --modes rolling --repeat 1 --dense-interval 12 --timeout-seconds 78 --output "$results/recovery" ;;
        *) note "unknown part $one"; exit 2 ;;
      esac
    done
  done
  note end
}
run "$@" 2>&1 | tee -a "$results/console.log"
exit "${PIPESTATUS[0]}"
