#!/usr/bin/env bash
# Builds the extension on a machine with one GPU, and tests or measures there.
# Usage: scripts/bench/on_one_gpu.sh RESULTS_DIRECTORY PART...
# Parts: build (the extension and its native tests, unless they are there), extension (tests of the core), native (its C++ tests on the GPU), sanitizer (under compute-sanitizer), job (the
# main job killed and recovered), exact (job, and a slot damaged in memory), boundary (transcripts), digests (those of the device against the host's), copies (copy_engine.py), NAME=VARIANTS (overhead.py --model NAME at the planner's W; files end in $TAG).
set -uo pipefail
cd "$(dirname "$0")/../.."
results=$1
shift
export PYTHONUNBUFFERED=1
began=$SECONDS
main_job() { timeout "${LIMIT:-250}" python3 -m pytest -m gpu tests/gpu/test_main_job.py -q -x -p no:cacheprovider ${JOB:-} 2>&1 | tail -45; }
note() { echo "=== [$((SECONDS - began)) s] $*"; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
# Slots need more shared memory than a tmpfs allows that was made when the machine had less.
# HUGE=never shows what huge pages are good for.
mount -o "remount,size=120G,huge=${HUGE:-advise}" /dev/shm || mount -o remount,size=120G /dev/shm
grep " /dev/shm " /proc/mounts
# NVRx hands tensors to its writer by file descriptors, one each.
ulimit -n "$(ulimit -Hn)"
for part in "$@"; do
  note "$part"
  rm -rf /dev/shm/moevement
  case $part in
    build)
      make -C csrc -j8 ../build/native/test_cuda >"$results/native_build.log" 2>&1 &
      python3 setup.py build_ext --inplace >"$results/build.log" 2>&1 || { tail -30 "$results/build.log"; exit 1; }
      wait
      python3 -c "import moevement_ext; print(moevement_ext.build_info())" ;;
    extension) timeout 100 python3 -m pytest tests/extension -q -p no:cacheprovider 2>&1 | tail -15 ;;
    native) timeout 100 build/native/test_cuda ;;
    sanitizer)
      for tool in memcheck racecheck; do
        # The tests provoke API errors on purpose.
        timeout 75 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 build/native/test_cuda --quick >"$results/$tool.log" 2>&1
        note "compute-sanitizer $tool: status $?"
        tail -6 "$results/$tool.log"
      done ;;
    exact)
      # Correctness alone: two jobs may share the GPU.
      RESULTS_DIRECTORY=$results timeout 150 python3 -m pytest -m gpu tests/gpu/test_device_digests.py -k damaged -q -x -p no:cacheprovider >"$results/damaged.log" 2>&1 &
      damaged=$!
      main_job
      wait $damaged
      tail -5 "$results/damaged.log" ;;
    job) main_job ;;
    boundary) timeout 200 python3 -m pytest -m gpu tests/gpu/test_boundary.py -q -x -s -p no:cacheprovider 2>&1 | tail -30 ;;
    digests) timeout 200 python3 -m pytest -m gpu tests/gpu/test_device_digests.py -q -x -s -p no:cacheprovider 2>&1 | tail -30 ;;
    copies) timeout 150 python3 scripts/bench/copy_engine.py ${COPIES:-} --output "$results/copy_engine" ;;
    *=*)
      # dcp and nvrx write to memory as well, once the slots are gone: a disk would have to hold several of their files.
      python3 scripts/bench/overhead.py --model "${part%%=*}" --window auto --limit-seconds "${LIMIT:-200}" \
        --variants "${part#*=}" --scratch /dev/shm/moevement ${OPTIONS:-} --output "$results/overhead_${part%%=*}${TAG:-}" \
        2>"$results/${part%%=*}${TAG:-}.log" &
      measured=$!
      (sleep 75 && grep -E "Shmem|MemAvailable" /proc/meminfo) &
      wait $measured
      tail -25 "$results/${part%%=*}${TAG:-}.log" ;;
  esac
done
note end
